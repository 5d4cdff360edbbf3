"""An inference server's batcher over TCP, and a client of it.

A message is a kind and a length, and then so many bytes: of `inference_wire` for steps,
msgpack for the rest. Answers have a status for a kind. Plain, or inside TLS with the
keys of the run. (gRPC needs ten times the CPU time a call, which here is made for every
step of an actor.) The server's side is coroutines of one thread.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import socket
import ssl
import struct
import threading
import time
from typing import Any, NoReturn

import msgpack

from impala_jax import policy as policy_lib
from impala_jax.distributed import (
  inference_batcher,
  inference_sessions,
  inference_wire,
  run_keys,
  transport,
)

_HEAD = struct.Struct('<II')  # Kind or status, length.
_JOIN, _STEP, _LEAVE = range(3)
_OK, _UNKNOWN, _NO_ROOM, _REFUSED = range(4)
_PATIENCE = 30.0  # Seconds for the rest of a message that has begun, either way.
_LARGEST_REPLY = 1 << 28
# A call that waits longer than the longest deadline of a batch has lost its server.
CALL_TIMEOUT = 30.0


class Refused(ValueError):
  """The server takes this client for one of another run or version; says why."""


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
    host: str = '127.0.0.1',
    port: int = 0,
    keys: run_keys.Keys | None = None,
  ):
    self._batcher = batcher
    self._wire = wire
    # A stranger's message may be no larger than one that makes sense.
    self._largest = wire.request_bytes(batcher.max_batch) + 4096
    both = not host and socket.has_dualstack_ipv6()
    listener = socket.create_server(
      (host, port),
      family=socket.AF_INET6 if both else socket.AF_INET,
      dualstack_ipv6=both,
      backlog=1024,
    )
    self.port = listener.getsockname()[1]
    self.address = f'{host}:{self.port}'
    self._connections: set[asyncio.Task[None]] = set()
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(
      target=self._loop.run_forever, name='inference-tcp', daemon=True
    )
    self._thread.start()
    self._listening = self._wait(self._listen(listener, keys))

  def close(self) -> None:
    """Ends all connections. Idempotent, bounded in time."""
    if self._loop.is_closed():
      return
    with contextlib.suppress(concurrent.futures.TimeoutError):
      self._wait(self._end())
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join(5.0)
    if not self._thread.is_alive():
      self._loop.close()

  def _wait(self, work: Any) -> Any:
    return asyncio.run_coroutine_threadsafe(work, self._loop).result(_PATIENCE)

  async def _listen(
    self, listener: socket.socket, keys: run_keys.Keys | None
  ) -> asyncio.Server:
    return await asyncio.start_server(
      self._serve,
      sock=listener,
      limit=1 << 20,
      ssl=None if keys is None else _tls(keys, ssl.PROTOCOL_TLS_SERVER),
      ssl_handshake_timeout=None if keys is None else 10.0,
    )

  async def _end(self) -> None:
    self._listening.close()
    for task in self._connections:
      task.cancel()
    if self._connections:
      await asyncio.wait(self._connections, timeout=5.0)

  async def _serve(
    self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
  ) -> None:
    task = asyncio.current_task()
    assert task is not None
    self._connections.add(task)
    sessions: set[int] = set()
    try:
      # That a host has gone is noticed in the end.
      plain = writer.get_extra_info('socket')
      plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
      plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
      go_on = True
      while go_on:
        # A client may have nothing to ask for long.
        kind, size = _HEAD.unpack(await reader.readexactly(_HEAD.size))
        if size > self._largest:
          self._refuse(words := f'{size} bytes: at most {self._largest}')
          status, reply, go_on = _REFUSED, words.encode(), False
        else:
          async with asyncio.timeout(_PATIENCE):
            message = await reader.readexactly(size)
          status, reply = await self._answer(kind, message, sessions)
        writer.write(_HEAD.pack(status, len(reply)) + reply)
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
    self, kind: int, message: bytes, sessions: set[int]
  ) -> tuple[int, bytes]:
    """Status and reply; what makes no sense ends neither connection nor server."""
    try:
      if kind == _STEP:
        request = self._wire.read_request(message, self._batcher.max_batch)
        decision = await asyncio.wrap_future(self._batcher.submit(request))
        return _OK, self._wire.pack_reply(request.session, decision)
      if kind == _JOIN:
        asked = _unpack(message, {'client': str, 'environments': int, 'form': int})
        if asked['form'] != self._wire.fingerprint:
          raise inference_wire.WireError(
            'another network, environment or version of the package'
          )
        session = self._batcher.join(asked['client'], asked['environments'])
        sessions.add(session)
        return _OK, msgpack.packb(session)
      if kind == _LEAVE:
        session = _unpack(message, {'session': int})['session']
        self._batcher.leave(session)
        sessions.discard(session)
        return _OK, b''
      raise inference_wire.WireError(f'a message of the kind {kind}')
    except inference_sessions.UnknownSession as e:
      return _UNKNOWN, str(e).encode()
    except inference_sessions.NoRoom as e:
      return _NO_ROOM, str(e).encode()
    except ValueError as e:
      self._refuse(str(e))
      return _REFUSED, str(e).encode()

  def _refuse(self, words: str) -> None:
    logging.warning('refused a request: %s', words)
    self._batcher.refuse()


class Channel:
  """A connection to a `Server`, made with the first call. Used by one thread.

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
    self._keys = keys
    self._timeout = timeout
    self._socket: socket.socket | None = None

  def join(self, client: str, environments: int) -> int:
    """See `Batcher.join`.

    Raises:
      transport.TransportError: no answer in time, or no room now.
      Refused: see there.
    """
    message = {
      'client': client, 'environments': environments, 'form': self._wire.fingerprint
    }  # fmt: skip
    return msgpack.unpackb(self._call(_JOIN, msgpack.packb(message), self._timeout))

  def step(self, request: inference_wire.Request) -> policy_lib.Decision:
    """The decisions on a request.

    Raises:
      policy_lib.StatesLost: the server does not know the session.
      transport.TransportError: no answer in time, or none that makes sense. Whether the
        step was made is not known: the session is of no use any more.
      Refused: see there.
    """
    reply = self._call(_STEP, self._wire.pack_request(request), self._timeout)
    try:
      return self._wire.read_reply(reply, len(request.ids), int(request.begins.sum()))
    except inference_wire.WireError as e:
      raise transport.TransportError(f'{self._name}: {e}') from None

  def leave(self, session: int) -> None:
    """Raises transport.TransportError where nobody answers within two seconds."""
    self._call(_LEAVE, msgpack.packb({'session': session}), 2.0)

  def close(self) -> None:
    """The server frees what the client has there. Idempotent."""
    if self._socket is not None:
      self._socket.close()
    self._socket = None

  @property
  def _name(self) -> str:
    return f'inference server at {self.address}'

  def _call(self, kind: int, message: bytes, timeout: float) -> bytes:
    deadline = time.monotonic() + timeout
    try:
      if self._socket is None:
        self._socket = self._connect(timeout)
      self._socket.settimeout(timeout)
      self._socket.sendall(b''.join([_HEAD.pack(kind, len(message)), message]))
      status, size = _HEAD.unpack(self._receive(self._socket, _HEAD.size, deadline))
      if size > _LARGEST_REPLY:
        raise OSError(f'an answer of {size} bytes')
      reply = self._receive(self._socket, size, deadline)
    except OSError as e:  # TimeoutError and those of TLS, too.
      # Not in step any more: the next call begins with a connection of its own.
      self.close()
      raise transport.TransportError(f'{self._name}: {e.strerror or e}') from None
    if status != _OK:
      self._raise(status, reply.decode(errors='replace'))
    return reply

  def _connect(self, timeout: float) -> socket.socket:
    host, _, port = self.address.rpartition(':')
    plain = socket.create_connection((host.strip('[]'), int(port)), timeout)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if self._keys is None:
      return plain
    # The name belongs to the certificate, not to the machine.
    context = _tls(self._keys, ssl.PROTOCOL_TLS_CLIENT)
    return context.wrap_socket(plain, server_hostname=run_keys.INFERENCE)

  def _receive(self, source: socket.socket, size: int, deadline: float) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
      source.settimeout(max(1e-3, deadline - time.monotonic()))
      count = source.recv_into(view)
      if not count:
        raise ConnectionError('the connection was closed')
      view = view[count:]
    return bytes(data)

  def _raise(self, status: int, words: str) -> NoReturn:
    if status == _UNKNOWN:
      raise policy_lib.StatesLost(words)
    if status == _NO_ROOM:
      raise transport.TransportError(f'{self._name}: {words}')
    raise Refused(f'{self._name}: {words}')


def _tls(keys: run_keys.Keys, side: int) -> ssl.SSLContext:
  context = ssl.SSLContext(side)
  context.minimum_version = ssl.TLSVersion.TLSv1_3
  context.load_cert_chain(keys.certificate, keys.key)
  context.load_verify_locations(keys.authority)
  context.verify_mode = ssl.CERT_REQUIRED
  return context


def _unpack(request: bytes, fields: dict[str, type]) -> dict[str, Any]:
  try:
    message = msgpack.unpackb(request)
  except Exception as e:  # Of many kinds.
    raise inference_wire.WireError(f'no msgpack: {e}') from None
  types = {k: type(v) for k, v in message.items()} if type(message) is dict else None
  if types != fields:
    raise inference_wire.WireError(f'must have {sorted(fields)}')
  return message
