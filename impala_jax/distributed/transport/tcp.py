"""The transport between machines that needs nothing but Python: rows over TCP.

A writer says once which rows it has (`_HELLO`), and then sends row after row. Each is
confirmed when it is in the reader's queue, a `LocalTransport`. A row that is not small
is announced (`_ASK`) and sent when the reader has a place for it (`_GO`): so the memory
of the reader is that of its queue and of a few rows on their way, however many writers
wait. Who waits is told each second that the reader is alive (`_WAIT`). Plain on
loopback; between machines inside TLS, with the keys of the run.
"""

import asyncio
import collections
import contextlib
import math
import socket
import struct
import threading
import time

import numpy as np

from impala_jax import types, unroll_layout
from impala_jax.distributed.connections import messages, service
from impala_jax.distributed.security import keys as run_keys
from impala_jax.distributed.security import ports
from impala_jax.distributed.transport import local as local_transport
from impala_jax.distributed.transport import protocol as transport

# Of a writer's messages, and of the answers to them.
_HELLO, _ASK, _ROW = range(3)
_OK, _GO, _WAIT, _ENDED, _OTHER_ROWS = range(5)
_ROWS = struct.Struct('<QQ')  # Fingerprint and bytes of a row.
# Rows of so many bytes are sent unasked, and wait in a place of their connection's own.
_SMALL = 1 << 16
_MOST = 4096  # Connections at once.
_PLACES = 16  # Larger rows that may be on their way at a time, at most a batch.
_ALIVE = 1.0  # Seconds between two answers to one who waits.
_SILENCE = 10.0  # Seconds without an answer, or without a byte, that end a connection.
_SLICE = 0.2  # Seconds of one wait of a writer, after which it looks for `close`.


class TcpReader(local_transport.FedReader):
  """Holds the queue in this process and reads from it (`transport.Reader`).

  Args:
    layout: of the rows.
    batch_size: rows in a batch.
    capacity: rows that may wait, at least `batch_size`. Memory: about `capacity + 4 *
      batch_size` rows at most, and one of each place on the way.
    host: interface to bind, '' for all; loopback unless the run spans machines.
    port: TCP port, 0 for any that is free.
    keys: of the learner; then only writers with a certificate of the run get in.

  Attributes:
    port: that it listens at.
    address: for writers on this machine; those on others put its name in.

  Raises:
    ValueError: names the argument that is out of range.
    OSError: the port is in use.
  """

  def __init__(
    self,
    layout: unroll_layout.UnrollLayout,
    batch_size: int,
    capacity: int,
    host: str = ports.LOOPBACK,
    port: int = 0,
    keys: run_keys.Keys | None = None,
  ):
    if not 0 <= port < 2**16:
      raise ValueError(f'port is {port}: must lie in [0, 65535]')
    queue = local_transport.LocalTransport(
      layout, batch_size, capacity, on_room=self._on_room
    )
    super().__init__(queue)
    self._row_writer = self._local.writer()
    self._closed = False
    # What follows is the loop's own.
    self.scratch = memoryview(bytearray(messages.HEAD.size + _SMALL))
    self._connections: set[_Connection] = set()
    self._full: collections.deque[_Connection] = collections.deque()  # Have a row.
    self._asking: collections.deque[_Connection] = collections.deque()
    self._places = list(layout.allocate(min(_PLACES, batch_size)))
    self._service = service.Service('tcp', lambda: _Connection(self), host, port, keys)
    self.port = self._service.port
    self.address = f'{ports.LOOPBACK}:{self.port}'
    self._service.loop.call_soon_threadsafe(self._tick)

  def close(self) -> None:
    """See `transport.Reader`."""
    self._closed = True
    self._local.close()
    self._service.close(self._end)

  # The rest is for the loop's thread.

  def now(self) -> float:
    return self._service.loop.time()

  def came(self, connection: '_Connection') -> None:
    self._connections.add(connection)
    if len(self._connections) > _MOST:
      self.refuse(connection, f'{_MOST} connections: no more at once')

  def left(self, connection: '_Connection') -> None:
    self._connections.discard(connection)
    for queue in (self._full, self._asking):
      with contextlib.suppress(ValueError):
        queue.remove(connection)

  def put(self, row: types.Rows) -> bool:
    """Whether a row went in: there was room, and nobody has waited for longer."""
    return not self._full and self._put(row)

  def wait_for_room(self, connection: '_Connection') -> None:
    """Its row goes in when there is room."""
    self._full.append(connection)
    connection.answer(_WAIT)
    self._admit()  # There may be by now, and nobody would tell.

  def ask(self, connection: '_Connection') -> None:
    """It gets a place for its row when one is free."""
    self._asking.append(connection)
    self._give_places()
    if connection in self._asking:
      connection.answer(_WAIT)

  def take_back(self, place: types.Rows) -> None:
    self._places.append(place)
    self._give_places()

  def refuse(self, connection: '_Connection', words: str, kind: int = _ENDED) -> None:
    """Ends a connection that does not speak as a `TcpWriter` of this run does."""
    self._malformed += 1
    self.refusals.add(f'somebody at {connection.peer}', words)
    connection.end(kind, words)

  def _on_room(self) -> None:
    """Called by the thread that reads."""
    if self._full and not self._closed:
      self._service.loop.call_soon_threadsafe(self._admit)

  def _admit(self) -> None:
    """Takes the rows that have waited the longest into the queue, while it has room."""
    while self._full and self._put(self._full[0].row):
      self._full.popleft().admitted()

  def _put(self, row: types.Rows) -> bool:
    try:
      self._row_writer.write(row, 0.0)
    except (TimeoutError, transport.Closed):
      return False
    return True

  def _give_places(self) -> None:
    while self._places and self._asking:
      self._asking.popleft().go(self._places.pop())

  def _tick(self) -> None:
    for connection in list(self._connections):
      connection.look()
    self._service.loop.call_later(_ALIVE, self._tick)

  async def _end(self) -> None:
    for connection in list(self._connections):
      connection.end(_ENDED, 'it is closing')


class _Connection(asyncio.BufferedProtocol):
  """One writer, in the loop's thread. The loop puts what comes where it belongs."""

  def __init__(self, owner: TcpReader):
    self._owner = owner
    self._known = False  # Whether its rows are those of the reader.
    self._waits = False  # For an answer: a place, or room for its row.
    self._begun = b''  # A message that is not whole, as far as it has come.
    self._place: types.Rows | None = None  # For a row: one of the owner's, or its own.
    self._got: int | None = None  # Bytes of the row in `_place`; None between rows.
    self.peer = 'an unknown address'

  @property
  def row(self) -> types.Rows:
    """That waits for room."""
    assert self._place is not None
    return self._place

  def connection_made(self, made: asyncio.BaseTransport) -> None:
    assert isinstance(made, asyncio.Transport)
    self._transport = made
    self.peer = str((made.get_extra_info('peername') or (self.peer,))[0])
    plain = made.get_extra_info('socket')
    # That a host has gone is noticed in the end.
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    self._heard = self._owner.now()
    self._owner.came(self)

  def connection_lost(self, _: Exception | None) -> None:
    self._owner.left(self)
    self._free()

  def get_buffer(self, _: int) -> memoryview:
    if self._got is not None:
      return self.row[self._got :].data
    return self._owner.scratch

  def buffer_updated(self, count: int) -> None:
    self._heard = self._owner.now()
    if self._transport.is_closing():
      return
    if self._got is not None:
      self._got += count
      if self._got == len(self.row):
        self._row_came(self.row)
      return
    data = self._owner.scratch[:count]
    if self._begun:
      data = memoryview(self._begun + data)
      self._begun = b''
    if problem := self._read(data):
      self._owner.refuse(self, problem)

  def look(self) -> None:
    """Tells one that waits that the reader is alive, and ends one that fell silent."""
    between = self._known and not self._begun and self._got is None
    if self._waits:
      self.answer(_WAIT)
    elif not between and self._owner.now() - self._heard > _SILENCE:
      self._owner.refuse(self, f'no more came of a message for {_SILENCE:.0f} s')

  def go(self, place: types.Rows) -> None:
    """The row that was announced may come."""
    self._place, self._waits = place, False
    self.answer(_GO)

  def admitted(self) -> None:
    """The row is in the queue."""
    self._waits = False
    self._free()
    self.answer(_OK)

  def answer(self, kind: int, words: bytes = b'') -> None:
    if not self._transport.is_closing():
      self._transport.write(messages.HEAD.pack(kind, len(words)) + words)

  def end(self, kind: int, words: str) -> None:
    """The last answer; there may be nobody any more who takes it."""
    self.answer(kind, words.encode())
    self._transport.close()

  def _read(self, data: memoryview) -> str:
    """Takes what came between two rows; what is wrong with it, or ''."""
    if self._waits:
      return 'spoke before it was answered'
    if len(data) < messages.HEAD.size:
      self._begun = bytes(data)
      return ''
    kind, size = messages.HEAD.unpack_from(data)
    body = data[messages.HEAD.size :]
    nbytes = self._owner.layout.nbytes
    small = nbytes <= _SMALL
    if len(body) > size:
      return 'said more than one thing at a time'
    if kind == _HELLO and not self._known and size == _ROWS.size:
      if len(body) < size:
        self._begun = bytes(data)
        return ''
      self._greeted(*_ROWS.unpack(body))
      return ''
    if kind == _ASK and self._known and size == 0 and not small:
      self._waits = True
      self._owner.ask(self)
      return ''
    expected = self._known and (small or self._place is not None)
    if kind != _ROW or not expected or size != nbytes:
      return f'a message of the kind {kind} and of {size} bytes'
    if small and len(body) == size:
      self._row_came(np.frombuffer(body, np.uint8))
      return ''
    if self._place is None:
      self._place = np.empty(nbytes, np.uint8)
    self._got = len(body)
    self._place[: self._got] = body
    return ''

  def _greeted(self, fingerprint: int, nbytes: int) -> None:
    form = self._owner.layout
    self._known = (fingerprint, nbytes) == (form.fingerprint, form.nbytes)
    if self._known:
      self.answer(_OK)
      return
    words = f'its unrolls have {form.nbytes} bytes, not {nbytes}, or other fields'
    self._owner.refuse(self, words, _OTHER_ROWS)

  def _row_came(self, row: types.Rows) -> None:
    self._got = None
    if self._owner.put(row):
      self.admitted()
      return
    if self._place is None:
      self._place = row.copy()  # It lies where the next message will.
    self._waits = True
    self._owner.wait_for_room(self)

  def _free(self) -> None:
    place, self._place, self._got = self._place, None, None
    if place is not None and len(place) > _SMALL:
      self._owner.take_back(place)


class TcpWriter:
  """Sends rows to a `TcpReader` (`transport.Writer`).

  The connection is made at the first `write` and again after a TransportError.

  Args:
    address: host:port of the reader.
    layout: of the rows.
    connect_timeout: seconds that a `write` waits for a reader to answer.
    keys: of a client, where the reader has keys.
  """

  def __init__(
    self,
    address: str,
    layout: unroll_layout.UnrollLayout,
    connect_timeout: float = 10.0,
    keys: run_keys.Keys | None = None,
  ):
    if not 0 < connect_timeout < math.inf:
      raise ValueError(f'connect_timeout is {connect_timeout}: must be positive')
    self._layout = layout
    self._connect_timeout = connect_timeout
    self._client = messages.Client(address, run_keys.LEARNER, keys, largest=1 << 12)
    self._lock = threading.Lock()
    self._closed = False
    self._heard = 0.0  # When the learner last answered, or was first asked,
    self._answered = False  # and whether it has, since then.
    self._asked = False  # For a place, which was not given yet.
    self._pending: bytes | None = None  # Header of the row that is not confirmed.

  def write(self, row: types.Rows, timeout: float) -> None:
    """See `transport.Writer`; may take `connect_timeout` longer than `timeout`.

    Raises:
      ValueError: also where the learner expects other rows.
    """
    transport.check_row(row, self._layout)
    deadline = time.monotonic() + timeout
    with self._lock:
      if self._closed:
        raise transport.Closed('the writer was closed')
      try:
        self._deliver(row, deadline)
      except TimeoutError:
        raise TimeoutError(
          f'the queue at {self._client.address} stayed full for {timeout:g} s'
        ) from None
      except OSError as e:
        self._client.close()
        raise transport.TransportError(
          f'the learner at {self._client.address} is out of reach: {e.strerror or e}'
        ) from e

  def close(self) -> None:
    """See `transport.Writer`. A row whose `write` timed out may still arrive."""
    self._closed = True
    if self._lock.acquire(timeout=_SLICE + self._connect_timeout):
      self._client.close()
      self._lock.release()

  def _deliver(self, row: types.Rows, deadline: float) -> None:
    if not self._client.connected:
      self._greet()
    header = row[: unroll_layout.HEADER.itemsize].tobytes()
    if self._pending is not None:
      repeated = self._pending == header
      self._confirm(deadline)
      if repeated:
        return
    if len(row) > _SMALL:
      if not self._asked:
        self._send(_ASK)
        self._asked = True
      self._await(_GO, deadline)
      self._asked = False
    self._send(_ROW, row.data)
    self._pending = header
    self._confirm(deadline)

  def _greet(self) -> None:
    self._asked, self._pending = False, None
    form = self._layout
    try:
      self._client.connect(time.monotonic() + self._connect_timeout)
      self._send(_HELLO, _ROWS.pack(form.fingerprint, form.nbytes))
      self._await(_OK, time.monotonic() + self._connect_timeout)
    except TimeoutError:
      raise ConnectionError('no answer') from None

  def _confirm(self, deadline: float) -> None:
    """Waits until the learner's queue took the pending row."""
    self._await(_OK, deadline)
    self._pending = None

  def _send(self, kind: int, *parts: bytes | memoryview) -> None:
    self._heard, self._answered = time.monotonic(), False
    try:
      self._client.send(kind, *parts, timeout=self._connect_timeout)
    except TimeoutError:
      raise ConnectionError('it takes nothing') from None

  def _await(self, kind: int, deadline: float) -> None:
    """Waits for an answer of `kind`.

    Raises:
      TimeoutError: it has not come until `deadline`, though the learner is alive.
      ConnectionError: the learner is silent, closing, or makes no sense.
      ValueError: it refuses this writer.
    """
    while True:
      if self._closed:
        raise transport.Closed('the writer was closed')
      now = time.monotonic()
      try:
        answer, words = self._client.receive(min(now + _SLICE, max(now, deadline)))
      except TimeoutError:
        silent = time.monotonic() - self._heard
        if silent > self._connect_timeout:
          raise ConnectionError('it does not answer') from None
        if time.monotonic() >= deadline and self._answered and silent < 3 * _ALIVE:
          raise
        continue
      self._heard, self._answered = time.monotonic(), True
      if answer == kind:
        return
      said = words.decode(errors='replace')
      if answer == _OTHER_ROWS:
        self._client.close()
        raise ValueError(
          f'the learner at {self._client.address} refuses these unrolls: {said}: '
          'another network, unroll length or environment?'
        )
      if answer != _WAIT:
        raise ConnectionError(said or f'an answer of the kind {answer}')
