"""How servers get their TCP ports, and clients to them."""

import errno
import os
import socket

# On one machine: a name would have to be known to it.
LOOPBACK = '127.0.0.1'


def bypass_proxy() -> None:
  """Has all gRPC of this process, in whatever library, connect without a proxy.

  gRPC asks for this variable first, and takes an empty one for none. What speaks HTTP
  otherwise, such as an environment that downloads a file, asks for others.
  """
  os.environ['grpc_proxy'] = ''  # noqa: SIM112


def reserve(port: int) -> tuple[int, socket.socket]:
  """Finds or checks a TCP port for a gRPC server on this machine.

  gRPC listens with SO_REUSEPORT: a second server on a port is no error, and both
  would share the connections.

  Args:
    port: 0 for any that is free.

  Returns:
    The port, and a lock that other callers respect until it is closed (or the
    process ends, in whatever way).

  Raises:
    OSError: the port is in use.
  """
  with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
      probe.bind(('', port))
      port = probe.getsockname()[1]
      # A name of Linux's abstract namespace, which the kernel frees.
      lock.bind(f'\0impala_jax-port-{port}')
    except OSError as e:
      lock.close()
      raise OSError(e.errno, f'port {port} is in use: {e.strerror}') from e
  return port, lock


def listen(host: str, port: int = 0, backlog: int | None = None) -> socket.socket:
  """A socket that listens at one address, or at all of IPv4 and IPv6.

  Args:
    host: '' for all addresses.
    port: 0 for any that is free.
    backlog: connections that may wait to be accepted; None for Python's default.

  Raises:
    OSError: the port is in use, or the host is not this machine's.
  """
  both = not host and socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  try:
    return socket.create_server(
      (host, port), family=family, dualstack_ipv6=both, backlog=backlog
    )
  except OSError as e:
    if e.errno == errno.EADDRINUSE:
      raise OSError(e.errno, f'port {port} is in use: {os.strerror(e.errno)}') from e
    raise
