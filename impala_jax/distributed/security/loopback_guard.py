"""Keeps a server that binds all interfaces out of reach of every other machine.

Reverb can neither bind loopback alone nor ask who calls. Here the kernel sees to it,
for the server's listening sockets and all that they accept, in one of two ways:

- A filter (classic BPF) drops each packet that does not go from a loopback address to
  a loopback address. To another machine the port looks like one behind a firewall that
  drops; so it does to a caller on this machine who uses one of its other addresses.
- Where the kernel refuses filters on TCP sockets (newer ones do without CAP_NET_ADMIN),
  the socket is bound to the loopback device, which asks for no privilege since Linux
  5.7. To the same callers the port looks closed.

Either can be done only once the socket is there. Until then a socket of our own stands
in front of it, which takes all connections and hands none on.
"""

import contextlib
import ctypes
import errno
import os
import pathlib
import socket
import stat
import struct
from collections.abc import Callable, Iterator

# Of Linux, for all processors that JAX runs on; the module `socket` lacks them.
_SO_ATTACH_FILTER = 26  # As an option to read: the filter that is attached.
_SO_LOCK_FILTER = 44
_SO_ATTACH_REUSEPORT_CBPF = 51
_SO_DETACH_REUSEPORT_BPF = 68

_LOOPBACK = b'lo'
# '1' if connections that a closed socket has not handed on go to one that shares its
# port: those to ours would go to the server.
_MIGRATE = pathlib.Path('/proc/sys/net/ipv4/tcp_migrate_req')
_WAYS_OUT = (
  'Ways out: a network namespace for the whole run (unshare --map-root-user --net, see '
  'docs/security.md), transport.kind=local, or on a network where nobody is a stranger '
  'transport.open_port=true'
)

_NETWORK_HEADER = -0x100000  # Offsets from here count from the IP header.
_LOAD_WORD, _LOAD_BYTE, _AND, _RETURN = 0x20, 0x30, 0x54, 0x06
_JUMP_IF_EQUAL = 0x15
_WHOLE_PACKET = 0xFFFFFFFF


class GuardError(OSError):
  """The kernel would not guard the port, or the server is not where it should be."""


@contextlib.contextmanager
def guarded(port: int) -> Iterator[None]:
  """A TCP server of this process that starts in the block serves loopback alone.

  While the block runs nothing reaches the server, not even from loopback; connections
  made in that time come to nothing.

  Args:
    port: that the server will bind with SO_REUSEPORT (as gRPC does), free so far.

  Raises:
    GuardError: on entry, where the kernel refuses; on exit, where nothing listens at
      `port` or one of its sockets cannot be guarded. The caller must stop the server.
    OSError: the port is in use.
  """
  with contextlib.ExitStack() as stack:
    gates: list[socket.socket] = []
    by_filter = _choose()
    # A dual-stack server shares the second; one of IPv4 alone the first.
    for family, host in ((socket.AF_INET, '0.0.0.0'), (socket.AF_INET6, '::')):
      with contextlib.suppress(_NoSuchFamily):
        gate = stack.enter_context(_shut_gate(family, host, port, by_filter))
        gates.append(gate)
    yield
    guard = _admit_loopback if by_filter else _bind_to_loopback
    _guard_listeners(port, {_identity(g.fileno()) for g in gates}, guard)
    for gate in gates:
      if not by_filter:
        _bind_to_loopback(gate)
      # Else the server's sockets would go on being chosen by it.
      gate.setsockopt(socket.SOL_SOCKET, _SO_DETACH_REUSEPORT_BPF, 0)


class _NoSuchFamily(Exception):
  """This machine has no IPv6."""


def _choose() -> bool:
  """Whether the kernel takes filters; else it binds sockets to the loopback device.

  Raises:
    GuardError: it does neither.
  """
  with socket.socket() as probe:
    try:
      _attach_filter(probe, _LOOPBACK_ONLY)
      return True
    except OSError as e:
      no_filter = e
    try:
      _bind_to_loopback(probe)
    except OSError as no_device:
      raise GuardError(
        'the kernel does not keep other machines away from the queue: it refuses a '
        f'filter on a TCP socket ({no_filter.strerror or no_filter}) and to bind one '
        f'to the loopback device ({no_device.strerror or no_device}). {_WAYS_OUT}'
      ) from no_filter
  return False


def _shut_gate(family: int, host: str, port: int, by_filter: bool) -> socket.socket:
  """A listening socket that gets all packets for the port, for nothing."""
  try:
    gate = socket.socket(family, socket.SOCK_STREAM)
  except OSError as e:
    raise _NoSuchFamily from e
  try:
    if family == socket.AF_INET6:
      gate.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    gate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    gate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    gate.bind((host, port))
    gate.listen(1)
    drop = _assemble([(_RETURN, 0, 0, 0)])
    # Of the sockets that share the port it chooses number 0: this, which is the first.
    _set_program(gate, _SO_ATTACH_REUSEPORT_CBPF, drop)
    if by_filter:
      _attach_filter(gate, drop)
  except BaseException as e:
    gate.close()
    if isinstance(e, OSError) and e.errno != errno.EADDRINUSE:
      raise _refusal(port, e, _WAYS_OUT) from e
    raise
  return gate


def _guard_listeners(
  port: int, ours: set[tuple[int, int]], guard: Callable[[socket.socket], None]
) -> None:
  found = 0
  for descriptor in os.listdir('/proc/self/fd'):
    try:
      if not stat.S_ISSOCK(os.stat(int(descriptor)).st_mode):
        continue
      listener = socket.socket(fileno=os.dup(int(descriptor)))
    except OSError:  # Closed meanwhile.
      continue
    with listener:
      if (
        listener.family in (socket.AF_INET, socket.AF_INET6)
        and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        and listener.getsockname()[1] == port
        and _identity(listener.fileno()) not in ours
      ):
        try:
          guard(listener)
        except OSError as e:
          raise _refusal(port, e) from e
        found += 1
  if not found:
    raise _refusal(port, OSError('nothing in this process listens there'))


def _refusal(port: int, e: OSError, advice: str = '') -> GuardError:
  return GuardError(f'cannot guard port {port}: {e.strerror or e}. {advice}'.strip())


def _identity(descriptor: int) -> tuple[int, int]:
  status = os.fstat(descriptor)
  return status.st_dev, status.st_ino


def _admit_loopback(target: socket.socket) -> None:
  _attach_filter(target, _LOOPBACK_ONLY)


def _attach_filter(target: socket.socket, program: bytes) -> None:
  """Attaches a filter for good: nobody can take it off again."""
  _set_program(target, _SO_ATTACH_FILTER, program)
  target.setsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER, 1)
  # Counts instructions, not bytes. Some sandboxes accept filters and ignore them.
  attached = len(target.getsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, len(program)))
  if attached != len(program) // 8:
    raise OSError('it takes one and forgets it')


def _bind_to_loopback(target: socket.socket) -> None:
  """For good, too: without privilege no socket can be unbound."""
  with contextlib.suppress(FileNotFoundError):  # Before Linux 5.14 nothing migrates.
    if _MIGRATE.read_text().strip() != '0':
      raise OSError('net.ipv4.tcp_migrate_req is not 0')
  target.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, _LOOPBACK)
  bound = target.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)
  if bound.rstrip(b'\0') != _LOOPBACK:
    raise OSError('it takes the name of a device and forgets it')


def _set_program(target: socket.socket, option: int, program: bytes) -> None:
  memory = ctypes.create_string_buffer(program, len(program))
  pointer = struct.pack('HP', len(program) // 8, ctypes.addressof(memory))
  target.setsockopt(socket.SOL_SOCKET, option, pointer)


def _loopback_only() -> bytes:
  """Passes packets from 127.0.0.0/8 to 127.0.0.0/8 and from ::1 to ::1."""
  # (offset of a word of the addresses, mask, value)
  v4 = [(12, 0xFF000000, 0x7F000000), (16, 0xFF000000, 0x7F000000)]
  v6 = [(8 + 4 * i, _WHOLE_PACKET, 1 if i % 4 == 3 else 0) for i in range(8)]
  drop = 3 + 3 * len(v4) + 1 + 3 * len(v6) + 1  # Where the last instruction is.
  code: list[tuple[int, int, int, int]] = []

  def check(words: list[tuple[int, int, int]]) -> None:
    for offset, mask, value in words:
      code.append((_LOAD_WORD, 0, 0, _NETWORK_HEADER + offset))
      code.append((_AND, 0, 0, mask))
      code.append((_JUMP_IF_EQUAL, 0, drop - len(code) - 1, value))
    code.append((_RETURN, 0, 0, _WHOLE_PACKET))

  code.append((_LOAD_BYTE, 0, 0, _NETWORK_HEADER))
  code.append((_AND, 0, 0, 0xF0))
  code.append((_JUMP_IF_EQUAL, 0, 3 * len(v4) + 1, 0x40))  # Else it is IPv6.
  check(v4)
  check(v6)
  code.append((_RETURN, 0, 0, 0))
  assert len(code) == drop + 1
  return _assemble(code)


def _assemble(code: list[tuple[int, int, int, int]]) -> bytes:
  return b''.join(
    struct.pack('HBBI', c, t, f, k & _WHOLE_PACKET) for c, t, f, k in code
  )


_LOOPBACK_ONLY = _loopback_only()
