"""An inference server's batcher over TCP, see `connection_lib`.

Its connections are coroutines of one thread: as many clients may wait as there are.
"""

import asyncio
import socket
from typing import Any

import msgpack

from impala_jax.distributed.connections import messages, service
from impala_jax.distributed.inference import batcher as inference_batcher
from impala_jax.distributed.inference import connection as connection_lib
from impala_jax.distributed.inference import sessions as inference_sessions
from impala_jax.distributed.inference import wire as inference_wire
from impala_jax.distributed.security import keys as run_keys
from impala_jax.distributed.security import ports
from impala_jax.runtime import refusals

_PATIENCE = 30.0  # Seconds for the rest of a message that has begun, either way;
# and for a connection to join, whose client may then have nothing to ask for long.
_MOST_STRANGERS = 256  # Connections beyond one for each environment.


class Server:
  """Serves a batcher. A client whose connection ends has left.

  Args:
    batcher: what to serve; not closed here.
    wire: the form of its messages.
    host: interface to bind, '' for all; loopback unless the run spans machines.
    port: 0 picks a free one.
    keys: of the server; then only clients with a certificate of the run get in.

  Raises:
    OSError: the port is taken.
  """

  def __init__(
    self,
    batcher: inference_batcher.Batcher,
    wire: inference_wire.Wire,
    host: str = ports.LOOPBACK,
    port: int = 0,
    keys: run_keys.Keys | None = None,
  ):
    self._batcher = batcher
    self._wire = wire
    # A stranger's message may be no larger than one that makes sense.
    self._largest = wire.request_bytes(batcher.max_batch) + 4096
    self._most = batcher.capacity + _MOST_STRANGERS
    self._refusals = refusals.Refusals('requests')
    self._connections: set[asyncio.Task[None]] = set()
    self._service = service.Service(
      'inference-tcp', self._make_protocol, host, port, keys
    )
    self.port = self._service.port
    self.address = f'{host}:{self.port}'

  def close(self) -> None:
    """Ends all connections. Idempotent, bounded in time."""
    self._service.close(self._end)

  def _make_protocol(self) -> asyncio.BaseProtocol:
    reader = asyncio.StreamReader(limit=1 << 20)
    return asyncio.StreamReaderProtocol(reader, self._serve)

  async def _end(self) -> None:
    for task in self._connections:
      task.cancel()
    if self._connections:
      await asyncio.wait(self._connections, timeout=5.0)

  async def _serve(
    self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
  ) -> None:
    task = asyncio.current_task()
    assert task is not None
    sender = str((writer.get_extra_info('peername') or ['unknown'])[0])
    if len(self._connections) >= self._most:
      self._refuse(sender, f'{self._most} connections: no more at once')
      writer.close()
      return
    self._connections.add(task)
    sessions: set[int] = set()
    try:
      # That a host has gone is noticed in the end.
      plain = writer.get_extra_info('socket')
      plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
      plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
      go_on = True
      while go_on:
        async with asyncio.timeout(None if sessions else _PATIENCE):
          head = await reader.readexactly(messages.HEAD.size)
        kind, size = messages.HEAD.unpack(head)
        if size > self._largest:
          self._refuse(sender, words := f'{size} bytes: at most {self._largest}')
          status, reply, go_on = connection_lib.REFUSED, words.encode(), False
        else:
          async with asyncio.timeout(_PATIENCE):
            message = await reader.readexactly(size)
          status, reply = await self._answer(kind, message, sessions, sender)
        writer.write(messages.HEAD.pack(status, len(reply)) + reply)
        async with asyncio.timeout(_PATIENCE):
          await writer.drain()
    except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
      pass  # It has gone, is too slow, or the server ends.
    finally:
      for session in sessions:
        self._batcher.leave(session)
      self._connections.discard(task)
      writer.close()

  async def _answer(
    self, kind: int, message: bytes, sessions: set[int], sender: str
  ) -> tuple[int, bytes]:
    """Status and reply; what makes no sense ends neither connection nor server."""
    try:
      if kind == connection_lib.STEP:
        request = self._wire.read_request(message, self._batcher.max_batch)
        decision = await asyncio.wrap_future(self._batcher.submit(request))
        return connection_lib.OK, self._wire.pack_reply(request.session, decision)
      if kind == connection_lib.JOIN:
        asked = _unpack(message, {'client': str, 'environments': int, 'form': int})
        if asked['form'] != self._wire.fingerprint:
          raise inference_wire.WireError(
            'another network, environment or version of the package'
          )
        session = self._batcher.join(asked['client'], asked['environments'])
        sessions.add(session)
        return connection_lib.OK, msgpack.packb(session)
      if kind == connection_lib.LEAVE:
        session = _unpack(message, {'session': int})['session']
        if session in sessions:  # Nobody leaves for another.
          self._batcher.leave(session)
          sessions.discard(session)
        return connection_lib.OK, b''
      raise inference_wire.WireError(f'a message of the kind {kind}')
    except inference_sessions.UnknownSession as e:
      return connection_lib.UNKNOWN, str(e).encode()
    except inference_sessions.NoRoom as e:
      return connection_lib.NO_ROOM, str(e).encode()
    except ValueError as e:
      self._refuse(sender, str(e))
      return connection_lib.REFUSED, str(e).encode(errors='replace')

  def _refuse(self, sender: str, words: str) -> None:
    self._refusals.add(sender, words)
    self._batcher.refuse()


def _unpack(request: bytes, fields: dict[str, type]) -> dict[str, Any]:
  try:
    message = msgpack.unpackb(request)
  except Exception as e:  # Of many kinds.
    raise inference_wire.WireError(f'no msgpack: {e}') from None
  types = {k: type(v) for k, v in message.items()} if type(message) is dict else None
  if types != fields:
    raise inference_wire.WireError(f'must have {sorted(fields)}')
  return message
