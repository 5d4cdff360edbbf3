"""Nothing but loopback reaches a guarded port, from the first moment on."""

import contextlib
import errno
import socket
import subprocess
import sys
import textwrap

import pytest

from impala_jax.distributed.control import board
from impala_jax.distributed.control import grpc as control_grpc
from impala_jax.distributed.security import loopback_guard, ports
from tests import network_namespaces

if sys.platform != 'linux':
  pytest.skip('a filter of Linux', allow_module_level=True)

# Answers every connection with its greeting, until it is killed.
_SERVER = """
import socket, sys, threading
from impala_jax.distributed.security import loopback_guard

def serve(listener):
  while True:
    connection, peer = listener.accept()
    connection.sendall(b'welcome')
    connection.close()

def listen(family, host):
  s = socket.socket(family)
  if family == socket.AF_INET6:
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
  s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
  s.bind((host, 5000))
  s.listen()
  threading.Thread(target=serve, args=(s,), daemon=True).start()

def start():
  if sys.argv[1] == 'v4':
    listen(socket.AF_INET, '0.0.0.0')
  else:
    listen(socket.AF_INET6, '::')
    listen(socket.AF_INET6, '::')

def say(word):
  print(word, flush=True)
  sys.stdin.readline()

if sys.argv[2] == 'device':
  loopback_guard._SO_ATTACH_FILTER = 9999  # As if filters were refused.
if sys.argv[2] == 'open':
  start()
else:
  with loopback_guard.guarded(5000):
    start()
    say('starting')
say('serves')
"""
_CLIENT = """
import socket, sys
for address in sys.argv[2:]:
  try:
    with socket.create_connection((address, 5000), float(sys.argv[1])) as s:
      print(s.recv(10).decode() or 'nothing')
  except OSError as e:
    print('unreachable')
"""
_REVERB = """
import sys
from impala_jax.distributed.transport import reverb as reverb_transport
from tests.distributed.transport import transport_contract as contract
form = contract.layout()
only = sys.argv[1] != 'open'
if sys.argv[1] == 'device':
  from impala_jax.distributed.security import loopback_guard
  loopback_guard._SO_ATTACH_FILTER = 9999  # As if filters were refused.
reader = reverb_transport.ReverbReader(form, 4, 8, port=5000, loopback_only=only)
print('serves', flush=True)
writer = reverb_transport.ReverbWriter('localhost:5000', form)
for i in range(4):
  writer.write(contract.row(form, i), 30.0)
print('read', len(reader.read(30.0).rows), flush=True)
sys.stdin.readline()
"""
_LOOPBACK = ('127.0.0.1', '127.9.9.9', '::1')


class Place:
  """A host with a server, and another host."""

  def __init__(self, network):
    self.server, self.stranger = network.hosts['server'], network.hosts['stranger']
    self.own = (self.server.address, self.server.address6)

  @contextlib.contextmanager
  def process(self, code: str, *args: str):
    # Who may use filters may do more than others with devices, too.
    humble = ['setpriv', '--bounding-set=-all', '--inh-caps=-all']
    child = self.server.popen(
      [*(humble if 'device' in args else []), sys.executable, '-c', code, *args],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    try:
      yield child
    finally:
      child.kill()
      child.communicate()

  def answers(self, host, addresses, patience: float = 0.7) -> list[str]:
    """What a client on `host` gets from each address."""
    client = [sys.executable, '-c', _CLIENT, str(patience), *addresses]
    return host.run(*client).split()

  def go_on(self, child) -> None:
    child.stdin.write('\n')
    child.stdin.flush()


@pytest.fixture(scope='module')
def place():
  network_namespaces.require()
  with network_namespaces.Network(['server', 'stranger']) as network:
    yield Place(network)


@pytest.mark.parametrize('way', ['filter', 'device'])
@pytest.mark.parametrize('family', ['v4', 'v6'])
def test_loopback_alone_reaches_a_guarded_port(place, family, way):
  loopback = _LOOPBACK[:2] if family == 'v4' else _LOOPBACK
  own = place.own[:1] if family == 'v4' else place.own
  with place.process(_SERVER, family, way) as child:
    assert child.stdout.readline() == 'starting\n'
    # The server listens already; not even loopback gets to it.
    for host, addresses in (
      (place.server, [*loopback, *own]),
      (place.stranger, own),
    ):
      assert set(place.answers(host, addresses)) == {'unreachable'}
    place.go_on(child)
    assert child.stdout.readline() == 'serves\n'
    # Often, since of several sockets any one may be chosen.
    welcome = place.answers(place.server, loopback * 8, 20.0)
    assert welcome == ['welcome'] * len(loopback) * 8
    for host in (place.server, place.stranger):
      assert place.answers(host, own * 3) == ['unreachable'] * len(own) * 3


def test_what_came_before_the_guard_does_not_get_in(place):
  """Where there is no filter, connections to the socket in front are made."""
  client = """
import socket, sys
with socket.create_connection((sys.argv[1], 5000), 20.0) as s:
  print('connected', flush=True)
  s.settimeout(20.0)
  try:
    print(s.recv(10).decode() or 'ended')
  except OSError as e:
    print('ended')
"""
  with place.process(_SERVER, 'v4', 'device') as child:
    assert child.stdout.readline() == 'starting\n'
    stranger = place.stranger.popen(
      [sys.executable, '-c', client, place.own[0]], stdout=subprocess.PIPE, text=True
    )
    try:
      assert stranger.stdout.readline() == 'connected\n'
      place.go_on(child)
      assert child.stdout.readline() == 'serves\n'
      assert stranger.stdout.readline() == 'ended\n'
    finally:
      stranger.kill()
      stranger.communicate()


def test_without_the_guard_the_same_server_is_reached(place):
  with place.process(_SERVER, 'v6', 'open') as child:
    assert child.stdout.readline() == 'serves\n'
    assert place.answers(place.stranger, place.own, 20.0) == ['welcome'] * 2
    assert place.answers(place.server, place.own, 20.0) == ['welcome'] * 2


@pytest.mark.parametrize('mode', ['filter', 'device', 'open'])
def test_the_queue_of_unrolls(place, mode):
  pytest.importorskip('reverb', reason='Reverb is not installed (latest set)')
  with place.process(_REVERB, mode) as child:
    assert child.stdout.readline() == 'serves\n'
    assert child.stdout.readline() == 'read 4\n'
    # gRPC's server speaks first, with its settings.
    client = textwrap.dedent(_CLIENT).replace('s.recv(10).decode()', 'len(s.recv(1))')
    seconds = '20' if mode == 'open' else '1.5'
    for host in (place.stranger, place.server):
      answers = host.run(sys.executable, '-c', client, seconds, *place.own).split()
      assert answers == (['1'] if mode == 'open' else ['unreachable']) * 2
    answers = place.server.run(sys.executable, '-c', client, '20', *_LOOPBACK).split()
    assert answers == ['1'] * 3


def test_parameters_are_served_on_loopback_alone_by_default():
  server = control_grpc.Server(board.Board())
  try:
    assert server.address == f'127.0.0.1:{server.port}'
    with socket.create_server(('127.0.0.2', server.port)):
      pass  # Free: nothing has bound all interfaces.
  finally:
    server.close()


@pytest.mark.skipif(
  not loopback_guard._choose(), reason='the kernel refuses filters without privilege'
)
def test_the_filter_cannot_be_taken_off():
  port, lock = ports.reserve(0)
  with lock, contextlib.ExitStack() as stack:
    with loopback_guard.guarded(port):
      listener = stack.enter_context(socket.socket())
      listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
      listener.bind(('', port))
      listener.listen()
    with socket.create_connection(('127.0.0.1', port), 20.0):
      accepted = stack.enter_context(listener.accept()[0])
    for sock in (listener, accepted):
      with pytest.raises(OSError) as e:
        sock.setsockopt(socket.SOL_SOCKET, 27, 0)  # SO_DETACH_FILTER
      assert e.value.errno == errno.EPERM


@pytest.mark.parametrize('option', ['_SO_ATTACH_FILTER', '_SO_LOCK_FILTER'])
def test_a_kernel_that_refuses(monkeypatch, option):
  monkeypatch.setattr(loopback_guard, option, 9999)
  monkeypatch.setattr(loopback_guard, '_LOOPBACK', b'no-such')
  port, lock = ports.reserve(0)
  with (
    lock,
    pytest.raises(loopback_guard.GuardError, match=r'refuses a filter .*network names'),
    loopback_guard.guarded(port),
  ):
    raise AssertionError('the server would have started')


def test_a_machine_on_which_connections_migrate(monkeypatch, tmp_path):
  monkeypatch.setattr(loopback_guard, '_SO_ATTACH_FILTER', 9999)
  monkeypatch.setattr(loopback_guard, '_MIGRATE', tmp_path / 'tcp_migrate_req')
  assert not loopback_guard._choose()
  (tmp_path / 'tcp_migrate_req').write_text('1\n')
  with pytest.raises(loopback_guard.GuardError, match='tcp_migrate_req is not 0'):
    loopback_guard._choose()


def test_a_server_that_is_not_there_and_a_port_in_use():
  port, lock = ports.reserve(0)
  with (
    lock,
    pytest.raises(loopback_guard.GuardError, match=f'port {port}: nothing in this'),
    loopback_guard.guarded(port),
  ):
    pass
  with socket.create_server(('', 0)) as other:
    port = other.getsockname()[1]
    with pytest.raises(OSError, match='in use'), loopback_guard.guarded(port):
      raise AssertionError('two servers share a port')
