"""TCP ports for servers that would share a port without an error."""

import socket


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
