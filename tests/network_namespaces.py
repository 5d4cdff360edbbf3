"""Hosts for tests: network namespaces with addresses of their own, joined by a wire.

Nothing touches the network of the machine. A namespace lives as long as the process
that holds it, and that one ends, with all that runs in its namespace, when the test's
process ends in whatever way.

    with network_namespaces.Network(['learner', 'actor']) as network:
      process = network.hosts['learner'].popen([sys.executable, '-m', 'http.server'])
      network.cut('actor')
      network.heal('actor')

Joined by a bridge of the kernel or, where delay or loss are asked for, by a forwarder
of frames in a process (this file as a program), since many kernels lack netem.
"""

import contextlib
import fcntl
import heapq
import json
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest

_TIMEOUT = 20.0  # Seconds for any one command.
# Waits for the end of its input, then kills all that is in its namespace.
_HOLDER = """
import os, signal, sys
print('held', flush=True)
sys.stdin.read()
me = os.readlink('/proc/self/ns/net')
for attempt in range(20):
  found = False
  for pid in filter(str.isdigit, os.listdir('/proc')):
    try:
      if int(pid) != os.getpid() and os.readlink(f'/proc/{pid}/ns/net') == me:
        os.kill(int(pid), signal.SIGKILL)
        found = True
    except OSError:
      pass
  if not found:
    break
"""


class Host:
  """One namespace: `address` and `address6` on the wire, and its own loopback."""

  def __init__(self, name: str, number: int, enter: list[str] | None):
    self.name = name
    self.address = f'10.77.0.{number}'
    self.address6 = f'fd77::{number:x}'
    self._rootless = os.geteuid() != 0
    kind = ['--user', '--map-root-user'] if self._rootless and enter is None else []
    self._holder = subprocess.Popen(
      [*(enter or []), 'unshare', *kind, '--net', sys.executable, '-c', _HOLDER],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      # A signal to the test's whole group must not end it before it has cleaned up.
      start_new_session=True,
    )
    assert self._holder.stdout is not None
    if self._holder.stdout.readline() != 'held\n':
      assert self._holder.stderr is not None
      raise OSError(self._holder.stderr.read().strip() or 'no namespace')
    self.pid = self._holder.pid
    self.run('ip', 'link', 'set', 'lo', 'up')

  @property
  def enter(self) -> list[str]:
    """Words to put in front of a command."""
    user = ['--user', '--preserve-credentials'] if self._rootless else []
    return ['nsenter', f'--target={self.pid}', *user, '--net']

  def popen(self, argv: Sequence[str], **kwargs: Any) -> 'subprocess.Popen[Any]':
    """Starts a process on this host; its pid is that of `argv` itself."""
    return subprocess.Popen([*self.enter, *argv], **kwargs)

  def run(self, *argv: str) -> str:
    """Runs a command on this host to its end; returns what it printed."""
    done = subprocess.run(
      [*self.enter, *argv],
      capture_output=True,
      text=True,
      timeout=_TIMEOUT,
      check=False,
    )
    if done.returncode:
      raise OSError(f'{" ".join(argv)}: {done.stderr.strip()}')
    return done.stdout

  def close(self) -> None:
    """Kills all that runs here, and waits for it."""
    try:
      self._holder.communicate(timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
      self._holder.kill()
      self._holder.communicate()


class Network:
  """Hosts that reach each other, until they are cut off.

  Args:
    names: of the hosts.
    delay: seconds that a frame is on its way, in each direction.
    loss: share of frames that get lost, in [0, 1).
    seed: of the losses.

  Attributes:
    hosts: by name.
  """

  def __init__(
    self, names: Sequence[str], delay: float = 0.0, loss: float = 0.0, seed: int = 0
  ):
    self.hosts: dict[str, Host] = {}
    self._names = list(names)
    self._forwarder: subprocess.Popen[str] | None = None
    self._stack = contextlib.ExitStack()
    try:
      first = self._host('the wire', 254, None)
      self._wire = first
      for number, name in enumerate(names, start=1):
        self.hosts[name] = self._host(name, number, first.enter)
      if delay or loss:
        self._lay_taps(delay, loss, seed)
      else:
        self._lay_bridge()
      for host in self.hosts.values():
        host.run('ip', 'address', 'add', f'{host.address}/24', 'dev', 'eth0')
        host.run('ip', 'address', 'add', f'{host.address6}/64', 'dev', 'eth0', 'nodad')
        host.run('ip', 'link', 'set', 'eth0', 'up')
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> 'Network':
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def cut(self, name: str) -> None:
    """Pulls the plug of one host; its own addresses and links stay up."""
    self._plug(name, False)

  def heal(self, name: str) -> None:
    self._plug(name, True)

  def close(self) -> None:
    """Ends everything; safe to call twice."""
    self._stack.close()

  def _host(self, name: str, number: int, enter: list[str] | None) -> Host:
    host = Host(name, number, enter)
    self._stack.callback(host.close)
    return host

  def _plug(self, name: str, plugged: bool) -> None:
    number = self._names.index(name)
    if self._forwarder is None:
      state = 'up' if plugged else 'down'
      self._wire.run('ip', 'link', 'set', f'port{number}', state)
    else:
      self._tell(json.dumps([number, plugged]))

  def _tell(self, line: str) -> None:
    assert self._forwarder is not None
    assert self._forwarder.stdin is not None
    assert self._forwarder.stdout is not None
    self._forwarder.stdin.write(line + '\n')
    self._forwarder.stdin.flush()
    if self._forwarder.stdout.readline() != 'done\n':
      raise OSError('the forwarder of frames has ended')

  def _lay_bridge(self) -> None:
    wire = self._wire
    wire.run('ip', 'link', 'add', 'bridge', 'type', 'bridge')
    wire.run('ip', 'link', 'set', 'bridge', 'up')
    for number, host in enumerate(self.hosts.values()):
      port = f'port{number}'
      wire.run('ip', 'link', 'add', port, 'type', 'veth', 'peer', 'name', 'eth0',
               'netns', str(host.pid))  # fmt: skip
      wire.run('ip', 'link', 'set', port, 'master', 'bridge', 'up')

  def _lay_taps(self, delay: float, loss: float, seed: int) -> None:
    count = len(self._names)
    self._forwarder = self._wire.popen(
      [sys.executable, __file__, str(count), str(delay), str(loss), str(seed)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self._stack.callback(self._end_forwarder)
    self._tell('')
    for number, host in enumerate(self.hosts.values()):
      self._wire.run(
        'ip', 'link', 'set', f'tap{number}', 'netns', str(host.pid), 'name', 'eth0'
      )

  def _end_forwarder(self) -> None:
    assert self._forwarder is not None
    self._forwarder.kill()
    self._forwarder.communicate()


def require(taps: bool = False) -> None:
  """Skips the test, saying why, where this machine gives it no such hosts.

  Args:
    taps: the test asks for delay or loss.
  """
  for tool in ('ip', 'unshare', 'nsenter'):
    if shutil.which(tool) is None:
      pytest.skip(f'needs hosts as network namespaces: no command {tool!r}')
  if taps and not os.access('/dev/net/tun', os.R_OK | os.W_OK):
    pytest.skip('needs TAP devices: /dev/net/tun may not be opened')
  try:
    with Network(['a', 'b'], delay=0.001 if taps else 0.0):
      pass
  except OSError as e:
    pytest.skip(f'needs hosts as network namespaces: {e}')


def _open_tap(name: str) -> int:
  tap = os.open('/dev/net/tun', os.O_RDWR | os.O_NONBLOCK)
  set_interface, tap_of_bare_frames = 0x400454CA, 0x1002
  fcntl.ioctl(
    tap, set_interface, struct.pack('16sH22x', name.encode(), tap_of_bare_frames)
  )
  return tap


def forward(count: int, delay: float, loss: float, seed: int) -> None:
  """Joins TAP devices `tap0`, … like a switch, until its input ends."""
  taps = [_open_tap(f'tap{i}') for i in range(count)]
  rng = random.Random(seed)
  plugged = [True] * count
  place: dict[bytes, int] = {}  # Hardware address -> number of its device.
  # (when it arrives, order of sending, from, to, frame)
  under_way: list[tuple[float, int, int, int, bytes]] = []
  order = 0
  while True:
    wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
    ready, _, _ = select.select([sys.stdin, *taps], [], [], wait)
    for source in ready:
      if source is sys.stdin:
        line = sys.stdin.readline()
        if not line:
          return
        if line.strip():
          number, state = json.loads(line)
          plugged[number] = state
        print('done', flush=True)
        continue
      sender = taps.index(source)
      for _ in range(64):
        try:
          frame = os.read(source, 65536)
        except OSError:  # None left, or the device is down.
          break
        place[frame[6:12]] = sender
        known = place.get(frame[:6])
        for receiver in range(count) if known is None else (known,):
          if receiver != sender and rng.random() >= loss:
            order += 1
            arrival = time.monotonic() + delay
            heapq.heappush(under_way, (arrival, order, sender, receiver, frame))
    while under_way and under_way[0][0] <= time.monotonic():
      _, _, sender, receiver, frame = heapq.heappop(under_way)
      if plugged[sender] and plugged[receiver]:
        with contextlib.suppress(OSError):  # The device is down or full: lost.
          os.write(taps[receiver], frame)


if __name__ == '__main__':
  forward(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
