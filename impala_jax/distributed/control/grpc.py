"""The control over gRPC, for processes other than the learner's.

Two unary methods with msgpack bodies, each call with a deadline. The parameters of
one version are serialised once, whoever asks for them. What arrives is judged at the
door (`wire`): what makes no sense is refused and counted. With the keys of the run both
sides show certificates; without, the address must be private to the run.
"""

import concurrent.futures
import threading
from typing import Any, NoReturn

import grpc
import msgpack
from flax import serialization

from impala_jax import types
from impala_jax.distributed.control import protocol, wire
from impala_jax.distributed.security import keys as run_keys
from impala_jax.distributed.security import ports
from impala_jax.distributed.transport import protocol as transport

_SERVICE = 'impala_jax.Control'
_OPTIONS = [
  ('grpc.max_send_message_length', -1),
  ('grpc.max_receive_message_length', -1),
  # Without this a second server on the same port silently shares it.
  ('grpc.so_reuseport', 0),
  # What the user's shell says of proxies is not about this machine's peers.
  ('grpc.enable_http_proxy', 0),
  # A client made after a failure asks anew, rather than wait out the pause of another.
  ('grpc.use_local_subchannel_pool', 1),
]


class Server:
  """Serves the control of a learner.

  Args:
    control: what to serve.
    host: interface to bind; loopback unless the run spans machines.
    port: 0 picks a free one.
    keys: of the learner; then only clients with a certificate of the run get in.

  Raises:
    OSError: the port is taken.
  """

  def __init__(
    self,
    control: protocol.Control,
    host: str = ports.LOOPBACK,
    port: int = 0,
    keys: run_keys.Keys | None = None,
  ):
    self._control = control
    self._serialised: tuple[int, bytes] = (-1, b'')
    self._lock = threading.Lock()
    pool = concurrent.futures.ThreadPoolExecutor(8, 'control')
    self._server = grpc.server(pool, options=_OPTIONS)
    handlers = {
      'Fetch': grpc.unary_unary_rpc_method_handler(self._fetch),
      'Report': grpc.unary_unary_rpc_method_handler(self._report),
    }
    self._server.add_generic_rpc_handlers(
      (grpc.method_handlers_generic_handler(_SERVICE, handlers),)
    )
    try:
      if keys is None:
        self.port = self._server.add_insecure_port(f'{host}:{port}')
      else:
        authority, certificate, key = (file.read_bytes() for file in keys)
        credentials = grpc.ssl_server_credentials(
          [(key, certificate)], authority, require_client_auth=True
        )
        self.port = self._server.add_secure_port(f'{host}:{port}', credentials)
    except RuntimeError as e:
      raise OSError(f'cannot listen on {host}:{port}: {e}') from e
    self.address = f'{host}:{self.port}'
    self._server.start()

  def close(self) -> None:
    self._server.stop(grace=1.0).wait(timeout=5.0)

  def _fetch(self, request: bytes, context: grpc.ServicerContext) -> bytes:
    try:
      newer = self._control.fetch(*wire.unpack_fetch(request))
    except wire.Refused as e:
      self._refuse(context, e)
    if newer is None:
      return bytes(msgpack.packb(None))
    version, params = newer
    with self._lock:
      if self._serialised[0] != version:
        message = {
          'version': version,
          'params': params,
          'learner': self._control.identity,
        }
        self._serialised = (version, serialization.msgpack_serialize(message))
      return self._serialised[1]

  def _report(self, request: bytes, context: grpc.ServicerContext) -> bytes:
    try:
      report, refused = wire.unpack(request, self._control.levels)
    except wire.Refused as e:
      self._refuse(context, e)
    for why in refused:
      self._control.refuse(f'{report.role} {report.index} at {context.peer()}: {why}')
    return bytes(msgpack.packb(self._control.report(report)))

  def _refuse(self, context: grpc.ServicerContext, why: wire.Refused) -> NoReturn:
    self._control.refuse(f'{context.peer()}: {why}')
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(why))
    raise AssertionError  # `abort` does not return.


class Client:
  """See `protocol.Client`: the control of another process, with deadlines.

  Args:
    address: host:port of a `Server`.
    timeout: seconds that one call may take.
    keys: of a client, where the server has keys.

  Attributes:
    learner: `Control.identity` of the learner that gave the last parameters; empty
      before. Versions of another one count for nothing.
  """

  def __init__(
    self, address: str, timeout: float = 20.0, keys: run_keys.Keys | None = None
  ):
    self.learner = ''
    self._address = address
    self._timeout = timeout
    if keys is None:
      self._channel = grpc.insecure_channel(address, options=_OPTIONS)
    else:
      authority, certificate, key = (file.read_bytes() for file in keys)
      # The name belongs to the certificate, not to the machine.
      name = ('grpc.ssl_target_name_override', run_keys.LEARNER)
      self._channel = grpc.secure_channel(
        address,
        grpc.ssl_channel_credentials(authority, key, certificate),
        options=[*_OPTIONS, name],
      )
    self._fetch = self._channel.unary_unary(f'/{_SERVICE}/Fetch')
    self._report = self._channel.unary_unary(f'/{_SERVICE}/Report')

  def fetch(self, have_version: int) -> tuple[int, types.Nest] | None:
    request = wire.pack_fetch(have_version, self.learner)
    message = serialization.msgpack_restore(self._call(self._fetch, request))
    if message is None:
      return None
    self.learner = message['learner']
    return message['version'], message['params']

  def report(self, report: protocol.Report) -> bool:
    return bool(msgpack.unpackb(self._call(self._report, wire.pack(report))))

  def close(self) -> None:
    self._channel.close()

  def _call(self, method: Any, request: bytes) -> bytes:
    try:
      reply: bytes = method(request, timeout=self._timeout)
      return reply
    except grpc.RpcError as e:
      words = e.code().name.lower()
      if e.code() is grpc.StatusCode.INVALID_ARGUMENT:
        words = f'refused: {e.details()}'
      raise transport.TransportError(f'learner at {self._address}: {words}') from None
