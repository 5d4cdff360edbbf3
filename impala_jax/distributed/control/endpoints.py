"""Where the learner listens and how the other roles get to it, in each mode.

| mode | queue, `tcp` | queue, `reverb` | parameters |
|---|---|---|---|
| one machine | loopback alone | the same, by the kernel's filter | as `tcp` |
| several machines | all interfaces | all interfaces | as `tcp` |
| several, with keys | TLS, all interfaces | loopback, behind a tunnel | as `tcp` |
"""

import contextlib
import pathlib
from collections.abc import Iterator

from impala_jax import unroll_layout
from impala_jax.distributed.control import grpc as control_grpc
from impala_jax.distributed.control import protocol as control
from impala_jax.distributed.security import keys as run_keys
from impala_jax.distributed.security import ports
from impala_jax.distributed.security import tunnel as tls_tunnel
from impala_jax.distributed.transport import protocol as transport
from impala_jax.distributed.transport import reverb as reverb_transport
from impala_jax.distributed.transport import tcp as tcp_transport
from impala_jax.runtime import files, role_environment
from impala_jax.runtime.run_directory import RunDirectory


@contextlib.contextmanager
def serve(
  kind: str,
  layout: unroll_layout.UnrollLayout,
  batch_size: int,
  capacity: int,
  parameters: control.Control,
  here: role_environment.RoleEnvironment,
  keys: pathlib.Path | None = None,
  open_port: bool = False,
) -> Iterator[tuple[transport.Reader, dict[str, str]]]:
  """The learner's two servers.

  Args:
    kind: of the transport, 'reverb' or 'tcp'.
    layout: see `ReverbReader`; so are batch_size and capacity.
    batch_size: rows.
    capacity: rows.
    parameters: what to serve.
    here: host and ports.
    keys: folder of the run's keys, for mutual TLS.
    open_port: on one machine, go on without the guard of Reverb's port.

  Yields:
    The reader, and for `address.json` the addresses `control` and `transport`.

  Raises:
    OSError: a port is in use or cannot be guarded.
    run_keys.KeysError, tls_tunnel.TunnelError: see there.
  """
  host = here.host or ports.LOOPBACK
  learner_keys = None if keys is None else run_keys.load(keys, run_keys.LEARNER)
  with contextlib.ExitStack() as stack:
    reader: transport.Reader
    if kind == 'tcp':
      reader = tcp_transport.TcpReader(
        layout,
        batch_size,
        capacity,
        '' if here.host else ports.LOOPBACK,
        here.queue_port,
        learner_keys,
      )
      queue_port = reader.port
    else:
      guarded = learner_keys is not None or not (here.host or open_port)
      reader = reverb_transport.ReverbReader(
        layout,
        batch_size,
        capacity,
        0 if learner_keys else here.queue_port,
        loopback_only=guarded,
      )
      queue_port = reader.port
    stack.callback(reader.close)
    if learner_keys is not None and kind == 'reverb':
      tunnel = tls_tunnel.Server(
        learner_keys, queue_port, here.queue_port, loopback_only=not here.host
      )
      stack.callback(tunnel.close)
      queue_port = tunnel.port
    server = control_grpc.Server(
      parameters,
      '[::]' if here.host else ports.LOOPBACK,
      here.control_port,
      keys=learner_keys,
    )
    stack.callback(server.close)
    yield (
      reader,
      {
        'control': join(host, server.port),
        'transport': join(host, queue_port),
      },
    )


@contextlib.contextmanager
def open_writer(
  kind: str,
  address: str,
  layout: unroll_layout.UnrollLayout,
  keys: pathlib.Path | None = None,
) -> Iterator[transport.Writer]:
  """A writer to the queue at an address of `serve`; to Reverb with keys by a tunnel.

  Raises:
    run_keys.KeysError, tls_tunnel.TunnelError: see there.
  """
  client_keys = None if keys is None else run_keys.load(keys, run_keys.CLIENT)
  with contextlib.ExitStack() as stack:
    writer: transport.Writer
    if kind == 'tcp':
      writer = tcp_transport.TcpWriter(address, layout, keys=client_keys)
    else:
      if client_keys is not None:
        tunnel = tls_tunnel.Client(client_keys, address)
        stack.callback(tunnel.close)
        address = tunnel.address
      writer = reverb_transport.ReverbWriter(address, layout)
    stack.callback(writer.close)
    yield writer


def open_control(address: str, keys: pathlib.Path | None = None) -> control_grpc.Client:
  """A client of the parameters at an address of `serve`.

  Raises:
    run_keys.KeysError: see there.
  """
  client_keys = None if keys is None else run_keys.load(keys, run_keys.CLIENT)
  return control_grpc.Client(address, keys=client_keys)


def read_address(run_dir: pathlib.Path, client_index: int) -> dict[str, str] | None:
  """The addresses of the learner that serves a client.

  Learner 0 writes last and says how many there are; clients are dealt over them.

  Args:
    run_dir: of the run.
    client_index: of an actor; 0 for the evaluator.

  Returns:
    `control` and `transport` as `serve` yields them, or None where they are not, or
    not wholly, there yet.
  """
  try:
    run = RunDirectory(run_dir)
    first = files.read_json(run.address(0))
    learner = client_index % int(first.get('learners', 1))
    own = files.read_json(run.address(learner)) if learner else first
    return {'control': own['control'], 'transport': own['transport']}
  except (ValueError, KeyError):
    return None


def join(host: str, port: int) -> str:
  """host:port, with brackets around a bare IPv6 address."""
  return f'[{host}]:{port}' if ':' in host and host[0] != '[' else f'{host}:{port}'
