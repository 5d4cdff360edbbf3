"""Keys of a run, the tunnel for unrolls and the secured control channel."""

import contextlib
import logging
import os
import pathlib
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import psutil
import pytest

from impala_jax.distributed.control import board
from impala_jax.distributed.control import grpc as control_grpc
from impala_jax.distributed.security import keys as run_keys
from impala_jax.distributed.security import tunnel as tls_tunnel
from impala_jax.distributed.transport import protocol as transport
from impala_jax.launching import processes
from impala_jax.runtime.run_directory import RunDirectory
from tests.distributed.transport import transport_contract as contract

x509 = pytest.importorskip('cryptography.x509', reason='no cryptography (latest set)')
_needs_stunnel = pytest.mark.skipif(
  not (shutil.which('stunnel') or shutil.which('stunnel4')),
  reason='the program stunnel is not installed (Debian: stunnel4)',
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run') / 'keys'
  run_keys.ensure(folder)
  return folder


@pytest.fixture(scope='module')
def other(tmp_path_factory):
  """Keys of another run."""
  folder = tmp_path_factory.mktemp('other') / 'keys'
  run_keys.ensure(folder)
  return folder


def learner_of(folder):
  return run_keys.load(folder, run_keys.LEARNER)


def client_of(folder):
  return run_keys.load(folder, run_keys.CLIENT)


class Echo:
  """A server on loopback that sends back what it gets, and counts connections."""

  def __init__(self, stack):
    self.connections = 0
    self._listener = stack.enter_context(socket.create_server(('127.0.0.1', 0)))
    self.port = self._listener.getsockname()[1]
    threading.Thread(target=self._accept, daemon=True).start()

  def _accept(self):
    with contextlib.suppress(OSError):
      while True:
        connection, _ = self._listener.accept()
        self.connections += 1
        threading.Thread(target=self._serve, args=[connection], daemon=True).start()

  def _serve(self, connection):
    with connection, contextlib.suppress(OSError):
      while data := connection.recv(1024):
        connection.sendall(data)


@pytest.fixture
def stack():
  with contextlib.ExitStack() as stack:
    yield stack


def ask(stack, connection) -> bytes:
  """What comes back for a word; nothing where the connection is refused."""
  stack.enter_context(connection)
  try:
    connection.settimeout(20.0)
    connection.sendall(b'word')
    return connection.recv(4)
  except OSError:
    return b''


def through(stack, client) -> bytes:
  connection = socket.socket(socket.AF_UNIX)
  connection.connect(client.address.removeprefix('unix:'))
  return ask(stack, connection)


def test_keys_are_private_and_made_once(folder):
  assert folder.stat().st_mode & 0o777 == 0o700
  files = {f.name: f.read_bytes() for f in folder.iterdir()}
  # None of the authority: nobody can sign another certificate.
  assert {n for n in files if n.endswith('.key')} == {
    'learner.key',
    'inference.key',
    'client.key',
  }
  for file in folder.glob('*.key'):
    assert file.stat().st_mode & 0o777 == 0o600
  run_keys.ensure(folder)
  assert files == {f.name: f.read_bytes() for f in folder.iterdir()}


def test_keys_that_will_not_do(folder, tmp_path, monkeypatch):
  with pytest.raises(run_keys.KeysError, match=r'no key .*No such file'):
    client_of(tmp_path / 'nowhere')
  keys = tmp_path / 'keys'
  shutil.copytree(folder, keys)
  (keys / 'learner.key').chmod(0o604)
  with pytest.raises(run_keys.KeysError, match=r'open to every user .*0604'):
    learner_of(keys)
  client_of(keys)
  (keys / 'client.crt').write_text('nothing')
  with pytest.raises(run_keys.KeysError, match=r'client\.crt is no certificate'):
    client_of(keys)
  run_keys.ensure(keys)  # Damaged: made anew.
  client_of(keys)
  (keys / 'client.key').unlink()
  run_keys.ensure(keys)  # Incomplete: made anew.
  client_of(keys)
  before = (keys / 'authority.crt').read_bytes()
  later = run_keys._now() + run_keys.datetime.timedelta(days=390)
  monkeypatch.setattr(run_keys, '_now', lambda: later)
  client_of(keys)
  run_keys.ensure(keys)  # Ends soon: made anew.
  assert (keys / 'authority.crt').read_bytes() != before
  much_later = later + run_keys.datetime.timedelta(days=500)
  monkeypatch.setattr(run_keys, '_now', lambda: much_later)
  with pytest.raises(run_keys.KeysError, match='ended on'):
    client_of(keys)
  assert [p.name for p in tmp_path.iterdir()] == ['keys']


@_needs_stunnel
def test_the_tunnel_refuses_strangers(stack, folder, other):
  echo = Echo(stack)
  server = tls_tunnel.Server(learner_of(folder), echo.port)
  stack.callback(server.close)

  def tunnel(keys):
    client = tls_tunnel.Client(keys, f'localhost:{server.port}')
    stack.callback(client.close)
    path = pathlib.Path(client.address.removeprefix('unix:'))
    assert path.parent.stat().st_mode & 0o077 == 0
    return client

  assert through(stack, tunnel(client_of(folder))) == b'word'
  assert echo.connections == 1
  # Of another run; nothing reaches the queue.
  assert through(stack, tunnel(client_of(other))) == b''
  # It trusts this server, but has nothing to show, or something of another run.
  for shown in (None, client_of(other)):
    context = ssl.create_default_context(cafile=folder / 'authority.crt')
    if shown is not None:
      context.load_cert_chain(shown.certificate, shown.key)
    plain = socket.create_connection(('127.0.0.1', server.port))
    try:
      connection = context.wrap_socket(plain, server_hostname=run_keys.LEARNER)
    except OSError:
      continue
    assert ask(stack, connection) == b''
  # No TLS at all.
  plain = socket.create_connection(('127.0.0.1', server.port))
  assert ask(stack, plain) in (b'', b'\x15\x03\x03\x00')  # An alert is no answer.
  assert echo.connections == 1
  assert through(stack, tunnel(client_of(folder))) == b'word'


@_needs_stunnel
def test_a_client_does_not_pass_for_the_learner(stack, folder):
  echo = Echo(stack)
  impostor = tls_tunnel.Server(client_of(folder), echo.port)
  stack.callback(impostor.close)
  client = tls_tunnel.Client(client_of(folder), f'localhost:{impostor.port}')
  stack.callback(client.close)
  assert through(stack, client) == b''
  assert echo.connections == 0


@_needs_stunnel
def test_unrolls_go_through(stack, folder):
  pytest.importorskip('reverb', reason='Reverb is not installed (latest set)')
  from impala_jax.distributed.transport import reverb as reverb_transport

  form = contract.layout()
  reader = reverb_transport.ReverbReader(form, 4, 8)
  stack.callback(reader.close)
  server = tls_tunnel.Server(learner_of(folder), reader.port)
  stack.callback(server.close)
  client = tls_tunnel.Client(client_of(folder), f'localhost:{server.port}')
  stack.callback(client.close)
  writer = reverb_transport.ReverbWriter(client.address, form)
  stack.callback(writer.close)
  sender = contract.Call(
    lambda: [writer.write(contract.row(form, i), contract.LONG) for i in range(20)]
  )
  link = contract.Link(reader, lambda: writer, slack=5)
  rows = contract.read_rows(link, 20)
  assert sender.result() is None
  assert contract.sequences(link, rows) == list(range(20))
  server.close()
  with pytest.raises(transport.TransportError, match='out of reach'):
    writer.write(contract.row(form, 20), 1.0)


def test_the_file_of_a_socket_is_not_yet_a_listener(tmp_path):
  path = tmp_path / 'a socket'
  with socket.socket(socket.AF_UNIX) as made:
    made.bind(str(path))
    assert path.is_socket()
    assert not tls_tunnel._listens_at(path)
    made.listen()
    assert tls_tunnel._listens_at(path)
  assert not tls_tunnel._listens_at(path)


@_needs_stunnel
@pytest.mark.parametrize('alone', [True, False])
def test_on_one_machine_it_listens_for_this_machine_alone(stack, folder, alone):
  server = tls_tunnel.Server(learner_of(folder), 9, loopback_only=alone)
  stack.callback(server.close)
  (tunnel,) = _stunnels()
  hosts = {c.laddr.ip for c in tunnel.net_connections() if c.status == 'LISTEN'}
  assert hosts == {'127.0.0.1'} if alone else hosts & {'::', '0.0.0.0'}


@_needs_stunnel
@pytest.mark.parametrize('name', ['x' * 90, 'a b%20:c', '实验'])
def test_a_folder_that_is_no_place_for_a_socket(
  stack, folder, monkeypatch, name, tmp_path
):
  pytest.importorskip('reverb', reason='Reverb is not installed (latest set)')
  from impala_jax.distributed.transport import reverb as reverb_transport

  (tmp_path / name).mkdir()
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / name))
  form = contract.layout()
  reader = reverb_transport.ReverbReader(form, 4, 8)
  stack.callback(reader.close)
  server = tls_tunnel.Server(learner_of(folder), reader.port)
  stack.callback(server.close)
  client = tls_tunnel.Client(client_of(folder), f'127.0.0.1:{server.port}')
  stack.callback(client.close)
  writer = reverb_transport.ReverbWriter(client.address, form)
  stack.callback(writer.close)
  writer.write(contract.row(form, 0), contract.LONG)


def _stunnels() -> list[psutil.Process]:
  return [c for c in psutil.Process().children() if 'stunnel' in c.name()]


@_needs_stunnel
def test_a_tunnel_that_dies_is_started_again(stack, folder, monkeypatch, caplog):
  echo = Echo(stack)
  server = tls_tunnel.Server(learner_of(folder), echo.port)
  stack.callback(server.close)
  client = tls_tunnel.Client(client_of(folder), f'localhost:{server.port}')
  stack.callback(client.close)
  assert through(stack, client) == b'word'
  for process in _stunnels():
    process.kill()
  deadline = time.monotonic() + contract.LONG
  answer = b''
  while answer != b'word':
    assert time.monotonic() < deadline
    time.sleep(0.1)
    with contextlib.suppress(OSError):
      answer = through(stack, client)
  assert 'stunnel ended and is started again' in caplog.text
  server.check()
  # Not for ever.
  monkeypatch.setattr(tls_tunnel, '_MAX_RESTARTS', 0)
  server.close()
  client.close()
  doomed = tls_tunnel.Client(client_of(folder), 'localhost:9')
  stack.callback(doomed.close)
  _stunnels()[0].kill()
  doomed._process._thread.join(contract.LONG)
  with pytest.raises(tls_tunnel.TunnelError, match='stunnel ended 1 times'):
    doomed.check()


@_needs_stunnel
def test_a_tunnel_that_cannot_start(stack, folder, tmp_path):
  keys = tmp_path / 'keys'
  shutil.copytree(folder, keys)
  (keys / 'client.key').write_text('nothing')
  with pytest.raises(
    tls_tunnel.TunnelError, match=r'stunnel does not start: .*PrivateKey'
  ):
    tls_tunnel.Client(client_of(keys), 'localhost:9')
  with pytest.raises(ValueError, match='must be host:port'):
    tls_tunnel.Client(client_of(folder), 'localhost')
  with socket.create_server(('', 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(OSError, match=f'port {port} is in use'):
      tls_tunnel.Server(learner_of(folder), 9, port)
  assert not _stunnels()


@_needs_stunnel
def test_a_tunnel_does_not_outlive_its_role(folder):
  code = (
    'import pathlib, sys, time\n'
    'from impala_jax.distributed.security import keys as run_keys\n'
    'from impala_jax.distributed.security import tunnel as tls_tunnel\n'
    'keys = run_keys.load(pathlib.Path(sys.argv[1]), run_keys.LEARNER)\n'
    'server = tls_tunnel.Server(keys, 9)\n'
    'print("up", flush=True)\n'
    'time.sleep(300)\n'
  )
  role = subprocess.Popen(
    [os.sys.executable, '-c', code, str(folder)], stdout=subprocess.PIPE, text=True
  )
  try:
    assert role.stdout.readline() == 'up\n'
    (tunnel,) = psutil.Process(role.pid).children()
    role.send_signal(signal.SIGKILL)
    assert not psutil.wait_procs([tunnel], timeout=contract.LONG)[1]
  finally:
    role.kill()
    role.communicate()


def test_without_stunnel_it_says_what_to_install(folder, monkeypatch):
  monkeypatch.setenv('PATH', '')
  with pytest.raises(tls_tunnel.TunnelError, match='apt-get install stunnel4'):
    tls_tunnel.Client(client_of(folder), 'localhost:9')


def test_a_path_that_stunnel_cannot_read(folder):
  keys = learner_of(folder)._replace(key=pathlib.Path('/a\nb'))
  with pytest.raises(ValueError, match='stunnel cannot read such a path'):
    tls_tunnel.render_server(keys, '::', 1, 2)


def test_control_with_keys(stack, folder, other, caplog):
  caplog.set_level(logging.CRITICAL)
  served = board.Board()
  params = {'w': np.ones(1)}
  served.publish(7, lambda: params)
  server = control_grpc.Server(served, keys=learner_of(folder))
  stack.callback(server.close)

  def fetch(keys, address=server.address):
    client = control_grpc.Client(address, timeout=10.0, keys=keys)
    stack.callback(client.close)
    return client.fetch(-1)

  assert fetch(client_of(folder)) == (7, params)
  # Trusts the server, and has nothing, or a certificate of another run, to show.
  bad = client_of(other)._replace(authority=client_of(folder).authority)
  for keys in (None, client_of(other), bad):
    with pytest.raises(transport.TransportError):
      fetch(keys)
  impostor = control_grpc.Server(served, keys=client_of(folder))
  stack.callback(impostor.close)
  with pytest.raises(transport.TransportError):
    fetch(client_of(folder), impostor.address)


_CONTROL = """
import pathlib, sys
from impala_jax.distributed.control import board, grpc
from impala_jax.distributed.security import keys
learner = keys.load(pathlib.Path(sys.argv[1]), keys.LEARNER)
print(grpc.Server(board.Board(), keys=learner).port, flush=True)
sys.stdin.read()
"""


def test_the_learners_control_takes_tls_1_3_alone(stack, folder, tmp_path):
  run = RunDirectory(tmp_path)
  learner = subprocess.Popen(
    [sys.executable, '-c', _CONTROL, str(folder)],
    env=processes.environment_of(run, 'learner', 0, 0),
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
  )
  stack.enter_context(learner)  # Closes its input, and waits for it.
  port = int(learner.stdout.readline())

  def version(newest):
    context = ssl.create_default_context(cafile=folder / 'authority.crt')
    context.load_cert_chain(folder / 'client.crt', folder / 'client.key')
    context.set_alpn_protocols(['h2'])
    context.maximum_version = newest
    plain = socket.create_connection(('127.0.0.1', port), timeout=contract.LONG)
    with plain, context.wrap_socket(plain, server_hostname=run_keys.LEARNER) as secure:
      return secure.version()

  assert version(ssl.TLSVersion.TLSv1_3) == 'TLSv1.3'
  with pytest.raises(OSError, match=r'(?i)handshake|closed|eof|reset'):
    version(ssl.TLSVersion.TLSv1_2)
