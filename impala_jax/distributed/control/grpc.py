"""The control over gRPC, for processes other than the learner's.

Two methods of one message each way, msgpack, each call with a deadline. The parameters
of one version are serialised once, whoever asks for them. What arrives is judged at the
door (`wire`): what makes no sense, is too large or comes too fast is refused and
counted. With the keys of the run both sides show certificates; without, the address
must be private to the run.
"""

import collections
import concurrent.futures
import threading
import time
import urllib.parse
from collections.abc import Iterator
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
  # Without this a second server on the same port silently shares it.
  ('grpc.so_reuseport', 0),
  # What the user's shell says of proxies is not about this machine's peers.
  ('grpc.enable_http_proxy', 0),
  # A client made after a failure asks anew, rather than wait out the pause of another.
  ('grpc.use_local_subchannel_pool', 1),
]
# Parameters are as large as they are; what comes to the learner is not.
_TO_CLIENT = ('grpc.max_receive_message_length', -1)
_TO_SERVER = ('grpc.max_receive_message_length', wire.LARGEST)
# Each call that has begun holds one, also one whose message does not come.
_THREADS = 64
_PATIENCE = 10.0  # Seconds for the message of a call.
# Of one connection: what another learner hands on of a thousand actors fits in.
_CALLS_PER_SECOND = 1000.0
_CALLS_AT_ONCE = 4000
_MOST_CONNECTIONS = 4096  # Whose rates are known.


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
    self._unpacking = threading.Lock()
    self._rates = _Rates()
    self._waiting: dict[grpc.ServicerContext, float] = {}  # Calls, since when.
    self._closed = threading.Event()
    pool = concurrent.futures.ThreadPoolExecutor(_THREADS, 'control')
    self._server = grpc.server(pool, options=[*_OPTIONS, _TO_SERVER])
    # A stream of one message looks the same to clients; here a call is seen, and can be
    # counted and ended, before its message is there.
    handlers = {
      'Fetch': grpc.stream_unary_rpc_method_handler(self._fetch),
      'Report': grpc.stream_unary_rpc_method_handler(self._report),
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
    threading.Thread(
      target=self._end_silent_calls, name='control-patience', daemon=True
    ).start()

  def close(self) -> None:
    self._closed.set()
    self._server.stop(grace=1.0).wait(timeout=5.0)

  def _fetch(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    sender = _host(context)
    request = self._receive(requests, context, sender)
    try:
      newer = self._control.fetch(*wire.unpack_fetch(request))
    except wire.Refused as e:
      self._refuse(context, sender, e)
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

  def _report(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    control, sender = self._control, _host(context)
    request = self._receive(requests, context, sender)
    try:
      with self._unpacking:  # In memory a message may be fifty times as large.
        report, refused = wire.unpack(request, control.levels, control.processes)
    except wire.Refused as e:
      self._refuse(context, sender, e)
    for why in refused:
      control.refusals.add(f'{report.role} {report.index} at {sender}', why)
    return bytes(msgpack.packb(control.report(report)))

  def _receive(
    self, requests: Iterator[bytes], context: grpc.ServicerContext, sender: str
  ) -> bytes:
    """The message of a call; ends the call where it is not to be had."""
    if not self._rates.take(context.peer()):
      allowed = f'at most {_CALLS_PER_SECOND:g} a second'
      why = wire.Refused('rate of calls', 'higher', allowed)
      self._refuse(context, sender, why, grpc.StatusCode.RESOURCE_EXHAUSTED)
    self._waiting[context] = time.monotonic()
    try:
      return next(requests)
    except Exception:  # Of many kinds: too large, broken off, none, too slow.
      allowed = f'one whole message of at most {wire.LARGEST} bytes'
      self._refuse(context, sender, wire.Refused('message', 'none', allowed))
    finally:
      self._waiting.pop(context, None)

  def _refuse(
    self,
    context: grpc.ServicerContext,
    sender: str,
    why: wire.Refused,
    code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT,
  ) -> NoReturn:
    self._control.refusals.add(sender, why)
    context.abort(code, str(why))
    raise AssertionError  # `abort` does not return.

  def _end_silent_calls(self) -> None:
    """Else a few of them would hold all threads for good."""
    while not self._closed.wait(1.0):
      limit = time.monotonic() - _PATIENCE
      for context, since in list(self._waiting.items()):
        if since < limit:
          context.cancel()


class _Rates:
  """Whether connections keep to the rate of calls. Safe for threads."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    # Calls that each may still make, and when that was so; longest silent first.
    self._left: collections.OrderedDict[str, tuple[float, float]]
    self._left = collections.OrderedDict()

  def take(self, connection: str) -> bool:
    now = time.monotonic()
    with self._lock:
      left, then = self._left.pop(connection, (float(_CALLS_AT_ONCE), now))
      left = min(left + (now - then) * _CALLS_PER_SECOND, _CALLS_AT_ONCE)
      self._left[connection] = max(0.0, left - 1.0), now
      if len(self._left) > _MOST_CONNECTIONS:
        self._left.popitem(last=False)
    return left >= 1.0


def _host(context: grpc.ServicerContext) -> str:
  """Where a call comes from, without the port, which is another each time."""
  return urllib.parse.unquote(context.peer()).rpartition(':')[0]


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
      self._channel = grpc.insecure_channel(address, options=[*_OPTIONS, _TO_CLIENT])
    else:
      authority, certificate, key = (file.read_bytes() for file in keys)
      # The name belongs to the certificate, not to the machine.
      name = ('grpc.ssl_target_name_override', run_keys.LEARNER)
      self._channel = grpc.secure_channel(
        address,
        grpc.ssl_channel_credentials(authority, key, certificate),
        options=[*_OPTIONS, _TO_CLIENT, name],
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
