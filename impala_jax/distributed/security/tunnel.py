"""Mutual TLS around a Reverb queue, by stunnel: one process of it on either side.

    writer -> unix socket -> stunnel ==TLS 1.3==> stunnel -> loopback -> reader

Each side shows a certificate of the run (`run_keys`); a peer without one is refused
before it can send Reverb a byte. On the writers' side the way in is a unix socket in
a folder of this user, so other users of that machine cannot use the tunnel.
"""

import collections
import contextlib
import logging
import math
import os
import pathlib
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable

from impala_jax.distributed.security import keys as run_keys
from impala_jax.distributed.security import ports
from impala_jax.runtime import restarts

_START = 15.0  # Seconds to come up.
_STOP = 5.0  # Seconds to end before it is killed.
_MAX_RESTARTS = 4  # Within the window of `restarts`.
_PAUSE = 60.0  # Seconds between two warnings.
# What it says before it has read its configuration, and afterwards.
_COMPLAINT = re.compile(r'(?:\[!\]|\[\.\](?= Binding)|LOG[0-4]\[.*?\]:) (.*\S)')
_COMMON = """\
foreground = yes
syslog = no
pid =
debug = warning
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
socket = l:SO_KEEPALIVE=1
socket = r:SO_KEEPALIVE=1

[queue]
sslVersionMin = TLSv1.3
verifyChain = yes
TIMEOUTconnect = 10
"""


class TunnelError(Exception):
  """The tunnel does not run; says why."""


def render_server(keys: run_keys.Keys, host: str, port: int, target: int) -> str:
  """Configuration of stunnel: TLS on host:port, plain to a port of loopback.

  Raises:
    ValueError: a path cannot be written in stunnel's format.
  """
  return _render(keys, f'accept = {host}:{port}\nconnect = {ports.LOOPBACK}:{target}\n')


def render_client(keys: run_keys.Keys, path: pathlib.Path, address: str) -> str:
  """Configuration of stunnel: plain at a unix socket, TLS to the learner's address.

  Raises:
    ValueError: see `render_server`; or `address` is not host:port.
  """
  host, _, port = address.rpartition(':')
  if not host or not port.isdigit() or any(c.isspace() for c in host):
    raise ValueError(f'address is {address!r}: must be host:port')
  return _render(
    keys,
    f'client = yes\naccept = {path}\nconnect = {address}\n'
    # The name belongs to the certificate, not to the machine. A client's
    # certificate bears another: no actor can pass for the learner.
    f'checkHost = {run_keys.LEARNER}\nsni = {run_keys.LEARNER}\n',
  )


def _render(keys: run_keys.Keys, service: str) -> str:
  files = {'CAfile': keys.authority, 'cert': keys.certificate, 'key': keys.key}
  text = _COMMON + service
  for option, file in files.items():
    path = str(file.absolute())
    if path != path.strip() or '\n' in path:
      raise ValueError(f'{option} is {path!r}: stunnel cannot read such a path')
    text += f'{option} = {path}\n'
  return text


class Server:
  """The learner's side.

  Args:
    keys: `run_keys.load(folder, run_keys.LEARNER)`.
    target: port of the queue on loopback.
    port: to listen at; 0 for any that is free.
    loopback_only: else on all interfaces.

  Attributes:
    port: that it listens at.

  Raises:
    TunnelError: stunnel is not installed or does not start; says why.
    OSError: the port is in use.
  """

  def __init__(
    self,
    keys: run_keys.Keys,
    target: int,
    port: int = 0,
    loopback_only: bool = False,
  ):
    self.port, self._port_lock = ports.reserve(port)
    host = '::' if _has_ipv6() else '0.0.0.0'
    host = ports.LOOPBACK if loopback_only else host
    try:
      config = render_server(keys, host, self.port, target)
      self._process = _Process(config, lambda: _listens(self.port))
    except BaseException:
      self._port_lock.close()
      raise

  def check(self) -> None:
    """Raises TunnelError where the tunnel has failed for good."""
    self._process.check()

  def close(self) -> None:
    self._process.close()
    self._port_lock.close()


class Client:
  """The writers' side, for all writers of a process.

  Args:
    keys: `run_keys.load(folder, run_keys.CLIENT)`.
    address: host:port of a `Server`. It need not be up.

  Attributes:
    address: for `ReverbWriter`.

  Raises:
    TunnelError: see `Server`.
    ValueError: `address` is not host:port.
  """

  def __init__(self, keys: run_keys.Keys, address: str):
    # Of this user alone.
    self._folder = tempfile.TemporaryDirectory(
      prefix='impala_jax-tls-', dir=_folder_for_sockets()
    )
    path = pathlib.Path(self._folder.name) / 'queue'
    try:
      config = render_client(keys, path, address)
      self._process = _Process(
        config,
        lambda: _listens_at(path),
        before=lambda: path.unlink(missing_ok=True),
      )
    except BaseException:
      self._folder.cleanup()
      raise
    self.address = f'unix:{path}'

  def check(self) -> None:
    """Raises TunnelError where the tunnel has failed for good."""
    self._process.check()

  def close(self) -> None:
    self._process.close()
    self._folder.cleanup()


class _Process:
  """One stunnel, started again when it dies.

  Args:
    config: for it.
    ready: whether it listens.
    before: called before each start.

  Raises:
    TunnelError: it is not installed, or was not ready in time.
  """

  def __init__(
    self,
    config: str,
    ready: Callable[[], bool],
    before: Callable[[], object] = lambda: None,
  ):
    program = shutil.which('stunnel') or shutil.which('stunnel4')
    if program is None:
      raise TunnelError(
        'mutual TLS needs the program stunnel on every machine of the run '
        '(Debian: apt-get install stunnel4)'
      )
    # It shall not outlive this process, however that ends.
    leash = ['setpriv', '--pdeathsig=KILL'] if shutil.which('setpriv') else []
    self._argv = [*leash, program, '-fd', '0']
    self._config = config
    self._before = before
    self._said: collections.deque[str] = collections.deque(maxlen=4)
    self._failure: TunnelError | None = None
    self._was_ready = False
    self._closed = threading.Event()
    self._lock = threading.Lock()  # Nothing starts once it is closed.
    self._child: subprocess.Popen[str] | None = None
    # The leash is tied to the thread that starts the process, not to this process.
    self._thread = threading.Thread(target=self._run, name='stunnel', daemon=True)
    self._thread.start()
    try:
      self._wait_until(ready)
    except BaseException:
      self.close()
      raise

  def check(self) -> None:
    if self._failure is not None:
      raise self._failure

  def close(self) -> None:
    with self._lock:
      self._closed.set()
      child = self._child
    if child is not None:
      child.terminate()
      try:
        child.wait(_STOP)
      except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    self._thread.join(_STOP)

  def _wait_until(self, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START
    while time.monotonic() < deadline:
      child = self._child
      if child is not None and child.poll() is not None:
        self._thread.join(_STOP)  # It reads the reason.
        raise TunnelError(f'stunnel does not start: {self._cause()}')
      if ready():
        self._was_ready = True
        return
      time.sleep(0.02)
    raise TunnelError(f'stunnel does not listen after {_START:.0f} s: {self._cause()}')

  def _cause(self) -> str:
    return '; '.join(self._said) or 'it says nothing'

  def _run(self) -> None:
    budget = restarts.RestartBudget(_MAX_RESTARTS)
    while True:
      with self._lock:
        if self._closed.is_set():
          return
        self._before()
        self._child = subprocess.Popen(
          self._argv,
          stdin=subprocess.PIPE,
          stdout=subprocess.DEVNULL,
          stderr=subprocess.PIPE,
          text=True,
          errors='replace',
        )
      self._attend(self._child)
      if self._closed.is_set() or not self._was_ready:
        return
      pause = budget.spend()
      if pause is None:
        self._failure = TunnelError(
          f'stunnel ended {budget.deaths} times: {self._cause()}'
        )
        logging.error('%s', self._failure)
        return
      logging.warning('stunnel ended and is started again: %s', self._cause())
      self._closed.wait(pause)

  def _attend(self, child: 'subprocess.Popen[str]') -> None:
    """Gives stunnel its configuration and passes on what it says, to its end."""
    assert child.stdin is not None
    assert child.stderr is not None
    try:
      child.stdin.write(self._config)
      child.stdin.close()
    except OSError:  # It has ended already.
      pass
    warned, unsaid = -math.inf, 0
    with child.stderr:
      for line in child.stderr:
        found = _COMPLAINT.search(line)
        if found is None:
          continue
        self._said.append(found[1])
        # Anybody can make it complain: a line for each would fill the disk.
        if time.monotonic() - warned < _PAUSE:
          unsaid += 1
          continue
        more = f' ({unsaid} more before)' if unsaid else ''
        logging.warning('stunnel: %s%s', found[1], more)
        warned, unsaid = time.monotonic(), 0
    child.wait()


def _listens(port: int) -> bool:
  """Whether some socket listens; a connection would be one more complaint."""
  listening = '0A'
  for table in ('/proc/self/net/tcp', '/proc/self/net/tcp6'):
    with contextlib.suppress(OSError), open(table) as lines:
      next(lines)
      for line in lines:
        _, local, _, state, *_ = line.split()
        if state == listening and int(local.rpartition(':')[2], 16) == port:
          return True
  return False


def _listens_at(path: pathlib.Path) -> bool:
  """The same of a Unix socket, whose file is there before anybody listens to it."""
  accepts = '00010000'
  with contextlib.suppress(OSError), open('/proc/self/net/unix') as lines:
    next(lines)
    for line in lines:
      _, _, _, flags, _, _, _, *name = line.split(maxsplit=7)
      if flags == accepts and name and name[0].rstrip('\n') == str(path):
        return True
  return False


def _folder_for_sockets() -> str:
  """TMPDIR, where a socket's path may be so long and gRPC can read such an address."""
  folder = tempfile.gettempdir()
  return folder if re.fullmatch(r'[-\w./]{1,60}', folder, re.ASCII) else '/tmp'


def _has_ipv6() -> bool:
  return socket.has_ipv6 and os.path.exists('/proc/net/if_inet6')
