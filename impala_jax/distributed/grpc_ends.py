"""Ports and channels of the run's gRPC services, plain or with the run's keys."""

from typing import Any

import grpc

from impala_jax.distributed import run_keys

OPTIONS = [
  ('grpc.max_send_message_length', -1),
  ('grpc.max_receive_message_length', -1),
  # Without this a second server on the same port silently shares it.
  ('grpc.so_reuseport', 0),
  # A client made after a failure asks anew, rather than wait out the pause of another.
  ('grpc.use_local_subchannel_pool', 1),
]


def listen(server: Any, host: str, port: int, keys: run_keys.Keys | None) -> int:
  """Has a `grpc.Server` or `grpc.aio.Server` listen; returns the port.

  Args:
    server: not started yet.
    host: interface to bind; loopback unless the run spans machines.
    port: 0 picks a free one.
    keys: of the server; then only clients with a certificate of the run get in.

  Raises:
    OSError: the port is taken.
  """
  try:
    if keys is None:
      return server.add_insecure_port(f'{host}:{port}')
    authority, certificate, key = (file.read_bytes() for file in keys)
    credentials = grpc.ssl_server_credentials(
      [(key, certificate)], authority, require_client_auth=True
    )
    return server.add_secure_port(f'{host}:{port}', credentials)
  except RuntimeError as e:
    raise OSError(f'cannot listen on {host}:{port}: {e}') from e


def connect(address: str, keys: run_keys.Keys | None, name: str) -> grpc.Channel:
  """A channel to host:port.

  Args:
    address: host:port.
    keys: of a client, where the server has keys.
    name: in the server's certificate.
  """
  if keys is None:
    return grpc.insecure_channel(address, options=OPTIONS)
  authority, certificate, key = (file.read_bytes() for file in keys)
  # The name belongs to the certificate, not to the machine.
  return grpc.secure_channel(
    address,
    grpc.ssl_channel_credentials(authority, key, certificate),
    options=[*OPTIONS, ('grpc.ssl_target_name_override', name)],
  )
