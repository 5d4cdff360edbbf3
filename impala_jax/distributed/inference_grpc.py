"""An inference server's batcher over gRPC, and a client of it.

Three unary methods, each call with a deadline: Join and Leave with msgpack, Step with
the bytes of `inference_wire`. The server's calls are coroutines of one thread: as many
clients may wait as there are, without a thread for each.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
import msgpack

from impala_jax import policy as policy_lib
from impala_jax.distributed import (
  grpc_ends,
  inference_batcher,
  inference_wire,
  run_keys,
  transport,
)

_SERVICE = 'impala_jax.Inference'
_START_TIMEOUT = 30.0
_GRACE = 1.0  # Seconds for the last answers.
# A call that waits longer than the longest deadline of a batch has lost its server.
CALL_TIMEOUT = 30.0


class Refused(ValueError):
  """The server takes this client for one of another run or version; says why."""


class Server:
  """Serves a batcher.

  Args:
    batcher: what to serve; not closed here.
    wire: the form of its messages.
    host: interface to bind; loopback unless the run spans machines.
    port: 0 picks a free one.
    keys: of the server; then only clients with a certificate of the run get in.

  Raises:
    OSError: the port is taken.
  """

  def __init__(
    self,
    batcher: inference_batcher.Batcher,
    wire: inference_wire.Wire,
    host: str = '127.0.0.1',
    port: int = 0,
    keys: run_keys.Keys | None = None,
  ):
    self._batcher = batcher
    self._wire = wire
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(
      target=self._loop.run_forever, name='inference-grpc', daemon=True
    )
    self._thread.start()
    try:
      self.port = self._wait(self._start(host, port, keys), _START_TIMEOUT)
    except BaseException:
      self._end_loop()
      raise
    self.address = f'{host}:{self.port}'

  def close(self) -> None:
    """Idempotent, bounded in time."""
    if self._loop.is_closed():
      return
    with contextlib.suppress(concurrent.futures.TimeoutError):
      self._wait(self._server.stop(_GRACE), _GRACE + 5.0)
    self._end_loop()

  def _wait(self, work: Any, timeout: float) -> Any:
    return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

  def _end_loop(self) -> None:
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join(5.0)
    if not self._thread.is_alive():
      self._loop.close()

  async def _start(self, host: str, port: int, keys: run_keys.Keys | None) -> int:
    # A stranger's message may be no larger than one that makes sense.
    largest = self._wire.request_bytes(self._batcher.max_batch) + 4096
    bound = ('grpc.max_receive_message_length', largest)
    options = [o for o in grpc_ends.OPTIONS if o[0] != bound[0]] + [bound]
    self._server = grpc.aio.server(options=options)
    handlers = {
      name: grpc.unary_unary_rpc_method_handler(_answering(self._batcher, method))
      for name, method in (
        ('Join', self._join),
        ('Leave', self._leave),
        ('Step', self._step),
      )
    }
    self._server.add_generic_rpc_handlers(
      (grpc.method_handlers_generic_handler(_SERVICE, handlers),)
    )
    found = grpc_ends.listen(self._server, host, port, keys)
    await self._server.start()
    return found

  async def _join(self, request: bytes) -> bytes:
    message = _unpack(request, {'client': str, 'environments': int, 'form': int})
    if message['form'] != self._wire.fingerprint:
      raise inference_wire.WireError(
        'another network, environment or version of the package'
      )
    session = self._batcher.join(message['client'], message['environments'])
    return msgpack.packb(session)

  async def _leave(self, request: bytes) -> bytes:
    self._batcher.leave(_unpack(request, {'session': int})['session'])
    return b''

  async def _step(self, message: bytes) -> bytes:
    request = self._wire.read_request(message, self._batcher.max_batch)
    decision = await asyncio.wrap_future(self._batcher.submit(request))
    return self._wire.pack_reply(request.session, decision)


def _unpack(request: bytes, fields: dict[str, type]) -> dict[str, Any]:
  try:
    message = msgpack.unpackb(request)
  except Exception as e:  # Of many kinds.
    raise inference_wire.WireError(f'no msgpack: {e}') from None
  if (
    not isinstance(message, dict) or {k: type(v) for k, v in message.items()} != fields
  ):
    raise inference_wire.WireError(f'must have {sorted(fields)}')
  return message


def _answering(
  batcher: inference_batcher.Batcher, method: Callable[[bytes], Awaitable[bytes]]
) -> Callable[[bytes, Any], Awaitable[bytes]]:
  """The method with its errors as codes of gRPC; none ends the server."""

  async def call(request: bytes, context: Any) -> bytes:
    try:
      return await method(request)
    except inference_batcher.UnknownSession as e:
      code, words = grpc.StatusCode.NOT_FOUND, str(e)
    except inference_batcher.NoRoom as e:
      code, words = grpc.StatusCode.RESOURCE_EXHAUSTED, str(e)
    except ValueError as e:
      logging.warning('refused a request: %s', e)
      batcher.refuse()
      code, words = grpc.StatusCode.INVALID_ARGUMENT, str(e)
    await context.abort(code, words)
    raise AssertionError('abort raises')

  return call


class Channel:
  """A connection to a `Server`. Used by one thread.

  Args:
    address: host:port.
    wire: the form of its messages.
    keys: of a client, where the server has keys.
    timeout: seconds that one call may take.
  """

  def __init__(
    self,
    address: str,
    wire: inference_wire.Wire,
    keys: run_keys.Keys | None = None,
    timeout: float = CALL_TIMEOUT,
  ):
    self.address = address
    self._wire = wire
    self._timeout = timeout
    self._channel = grpc_ends.connect(address, keys, run_keys.INFERENCE)
    method = lambda name: self._channel.unary_unary(f'/{_SERVICE}/{name}')
    self._join, self._leave, self._step = map(method, ('Join', 'Leave', 'Step'))

  def join(self, client: str, environments: int) -> int:
    """See `Batcher.join`.

    Raises:
      transport.TransportError: no answer in time, or no room now.
      Refused: see there.
    """
    message = {
      'client': client, 'environments': environments, 'form': self._wire.fingerprint
    }  # fmt: skip
    return msgpack.unpackb(self._call(self._join, msgpack.packb(message)))

  def step(self, request: inference_wire.Request) -> policy_lib.Decision:
    """The decisions on a request.

    Raises:
      policy_lib.StatesLost: the server does not know the session.
      transport.TransportError: no answer in time, or none that makes sense. Whether the
        step was made is not known: the session is of no use any more.
      Refused: see there.
    """
    reply = self._call(self._step, self._wire.pack_request(request))
    try:
      return self._wire.read_reply(reply, len(request.ids), int(request.begins.sum()))
    except inference_wire.WireError as e:
      raise transport.TransportError(f'{self._name}: {e}') from None

  def leave(self, session: int) -> None:
    """Raises transport.TransportError where nobody answers within two seconds."""
    self._call(self._leave, msgpack.packb({'session': session}), 2.0)

  def close(self) -> None:
    self._channel.close()

  @property
  def _name(self) -> str:
    return f'inference server at {self.address}'

  def _call(self, method: Any, message: bytes, timeout: float | None = None) -> bytes:
    try:
      return method(message, timeout=timeout or self._timeout)
    except grpc.RpcError as e:
      self._raise(e)

  def _raise(self, error: Any) -> NoReturn:
    code = error.code()
    if code is grpc.StatusCode.NOT_FOUND:
      raise policy_lib.StatesLost(error.details()) from None
    if code is grpc.StatusCode.INVALID_ARGUMENT:
      raise Refused(f'{self._name}: {error.details()}') from None
    words = code.name.lower()
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
      words = error.details()
    raise transport.TransportError(f'{self._name}: {words}') from None
