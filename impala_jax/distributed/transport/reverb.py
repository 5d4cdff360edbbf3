"""The transport between machines: a Reverb queue inside the learner's process.

A row travels as one item of one tensor. On the learner's side a thread moves rows
into a `LocalTransport`, whose reader checks them. Reverb has neither authentication
nor encryption and binds all interfaces: unless told otherwise a reader lets loopback
alone through, see docs/security.md.
"""

import atexit
import contextlib
import logging
import math
import os
import reprlib
import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from impala_jax import types, unroll_layout
from impala_jax.distributed.security import loopback_guard, ports
from impala_jax.distributed.transport import local as local_transport
from impala_jax.distributed.transport import protocol as transport
from impala_jax.distributed.transport import (
  reverb_native,
  reverb_server,
)

# Seconds between looks at an empty queue: at first, and at most, each twice as long.
_LOOK = 0.0005
_LOOK_AT_MOST = 0.008
# Seconds of vain reads, while rows wait in Reverb, after which it is asked anew (it was
# seen to sleep on where other work took the cores), and after which it is given up:
# an item that claims an absurd size blocks it for good.
_ASLEEP = 5.0
_STUCK = 30.0
# Seconds of one wait of a writer, after which it looks for `close`.
_SLICE = 0.2
# Seconds that a server gets to answer a question.
_ANSWER = 2.0
# The tables: one of rows of so many bytes, and one that fills when the learner closes.
_TABLE = 'unrolls_{}'
_CLOSING = 'closing'


class ReverbReader(local_transport.FedReader):
  """Starts the queue in this process and reads from it (`transport.Reader`).

  Args:
    layout: of the rows.
    batch_size: rows in a batch.
    capacity: rows that may wait, at least `batch_size`. One batch waits unpacked,
      the rest in Reverb's table (at least one), up to five are on their way
      between the two, and each blocked writer parks one on the server.
    port: TCP port of the server, 0 for any that is free.
    loopback_only: whether the kernel shall keep all other machines away. False: any
      peer that reaches this machine can read, write and crash the queue.

  Attributes:
    port: that of the server.
    address: for writers on this machine; those on others put its name in.

  Raises:
    ValueError: names the argument that is out of range.
    OSError: the port is in use, or (`loopback_guard.GuardError`) cannot be guarded.
    ImportError: Reverb is not installed.
  """

  def __init__(
    self,
    layout: unroll_layout.UnrollLayout,
    batch_size: int,
    capacity: int,
    port: int = 0,
    loopback_only: bool = True,
  ):
    if not 0 <= port < 2**16:
      raise ValueError(f'port is {port}: must lie in [0, 65535]')
    table_size = max(1, capacity - batch_size)
    super().__init__(
      local_transport.LocalTransport(layout, batch_size, min(capacity, batch_size))
    )
    self._capacity = table_size + batch_size
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    self.port, self._port_lock = ports.reserve(port)
    self.address = f'{ports.LOOPBACK}:{self.port}'
    guard = loopback_guard.guarded if loopback_only else contextlib.nullcontext
    with guard(self.port):
      self._server = reverb_server.Server(
        _TABLE.format(layout.nbytes), table_size, _CLOSING, self.port
      )
    self._moved = self._moved_before = 0  # Rows.
    self._asked_before = 1  # When the last row came.
    self._vain = 0.0  # Seconds of reads since the last row, rows waiting.
    self._failure: Exception | None = None
    self._closed = threading.Event()
    self._asked = 0  # Threads that were started to read; the last one is in charge.
    self._ask()
    # Else blocked writers would be told that their rows went in.
    atexit.register(self.close)

  def read(self, timeout: float) -> transport.Batch:
    """See `transport.Reader`; TransportError where Reverb itself failed."""
    try:
      return super().read(timeout)
    except TimeoutError:
      self._check_flow(timeout)
      raise
    except transport.Closed:
      if self._failure is None:
        raise
      first = str(self._failure).partition('\n')[0]
      raise transport.TransportError(
        f'reading from Reverb failed: {first}'
      ) from self._failure

  def stats(self) -> transport.ReaderStats:
    """See `transport.Reader`."""
    stats = super().stats()
    stats.capacity = self._capacity
    if not self._closed.is_set():
      stats.queued += self._server.waiting()
    return stats

  def close(self) -> None:
    """See `transport.Reader`."""
    if self._closed.is_set():
      return
    self._closed.set()
    atexit.unregister(self.close)
    self._local.close()
    self._announce_close()
    self._thread.join(5.0)
    # About a second with open calls; the thread is for the worst case.
    stopper = threading.Thread(target=self._server.stop, daemon=True)
    stopper.start()
    stopper.join(10.0)
    del self._server
    self._port_lock.close()

  def _check_flow(self, waited: float) -> None:
    if self._moved != self._moved_before or not self._server.waiting():
      self._moved_before, self._vain = self._moved, 0.0
      self._asked_before = self._asked
      return
    self._vain += waited
    if self._vain > _ASLEEP and self._asked == self._asked_before:
      logging.warning('Reverb is asked anew: nothing came, although rows wait')
      self._ask()
    if self._vain > _STUCK:
      raise transport.TransportError(
        f'Reverb delivers nothing although rows wait in it (for {self._vain:.0f} s)'
      )

  def _announce_close(self) -> None:
    """Tells writers: stopping a Reverb server confirms what it never inserted."""
    connection = reverb_native.Connection(f'{ports.LOOPBACK}:{self.port}')
    with contextlib.suppress(ConnectionError):  # The server broke: nobody waits.
      connection.send(_CLOSING, np.zeros(1, np.uint8))
      connection.flush(_ANSWER)
    connection.close()

  def _ask(self) -> None:
    self._asked += 1
    self._thread = threading.Thread(
      target=self._pump, args=(self._asked,), name='reverb', daemon=True
    )
    self._thread.start()

  def _pump(self, number: int) -> None:
    """Moves rows into the local queue until `close`, or until another is asked."""
    writer = self._local.writer()
    pause = _LOOK
    while number == self._asked and not self._closed.is_set():
      try:
        before = self._moved
        for item in self._server.take():
          self._moved += 1
          if self._is_row(item):
            # Until the learner has room or `close`.
            writer.write(item[0], threading.TIMEOUT_MAX)
      except transport.Closed:
        return
      except Exception as e:
        self._failure = e
        self._local.close()
        return
      if self._moved != before:
        pause = _LOOK
      else:
        self._closed.wait(pause)
        pause = min(2 * pause, _LOOK_AT_MOST)

  def _is_row(self, item: list[npt.NDArray[Any]]) -> bool:
    shapes = [(str(x.dtype), x.shape) for x in item]
    if shapes == [('uint8', (self.layout.nbytes,))]:
      return True
    # From something that is no `ReverbWriter`.
    self._malformed += 1
    self.refusals.add('unknown', f'an item of {reprlib.repr(shapes)}')
    return False


class ReverbWriter:
  """Sends rows to a `ReverbReader` (`transport.Writer`).

  The connection is made at the first `write` and again after a TransportError.

  Args:
    address: host:port of the reader.
    layout: of the rows.
    connect_timeout: seconds that a `write` waits for a server to answer.

  Raises:
    ImportError: Reverb is not installed.
  """

  def __init__(
    self,
    address: str,
    layout: unroll_layout.UnrollLayout,
    connect_timeout: float = 10.0,
  ):
    if not 0 < connect_timeout < math.inf:
      raise ValueError(f'connect_timeout is {connect_timeout}: must be positive')
    self._address = address
    self._layout = layout
    self._connect_timeout = connect_timeout
    reverb_native.client_module()  # Fails here rather than at the first row.
    self._lock = threading.Lock()
    self._closed = False
    self._connection: reverb_native.Connection | None = None
    # Header of the row that was given to Reverb and is not confirmed.
    self._pending: bytes | None = None

  def write(self, row: types.Rows, timeout: float) -> None:
    """See `transport.Writer`; may take `connect_timeout` longer than `timeout`.

    Raises:
      ValueError: also where the learner expects rows of another size.
    """
    transport.check_row(row, self._layout)
    deadline = time.monotonic() + timeout
    with self._lock:
      if self._closed:
        raise transport.Closed('the writer was closed')
      try:
        self._deliver(row, deadline)
      except ConnectionError as e:
        self._disconnect()
        raise transport.TransportError(
          f'the learner at {self._address} is out of reach: {e}'
        ) from e
      except TimeoutError:
        raise TimeoutError(
          f'the queue at {self._address} stayed full for {timeout:g} s'
        ) from None

  def close(self) -> None:
    """See `transport.Writer`. A row whose `write` timed out may still arrive."""
    self._closed = True
    if self._lock.acquire(timeout=_SLICE + 2 * _ANSWER):  # A blocked write ends first.
      self._disconnect()
      self._lock.release()

  def _deliver(self, row: types.Rows, deadline: float) -> None:
    connection = self._connection or self._connect()
    header = row[: unroll_layout.HEADER.itemsize].tobytes()
    if self._pending is not None:
      # Reverb still holds a row whose write timed out, and will send it.
      repeated = self._pending == header
      self._confirm(connection, deadline)
      if repeated:
        return
    connection.send(_TABLE.format(self._layout.nbytes), row)
    self._pending = header
    self._confirm(connection, deadline)

  def _connect(self) -> reverb_native.Connection:
    # A new client each time: an old one would wait out gRPC's back-off.
    connection = reverb_native.Connection(self._address)
    names = [t.name for t in connection.tables(self._connect_timeout)]
    table = _TABLE.format(self._layout.nbytes)
    if table not in names:
      raise ValueError(
        f'the learner at {self._address} has the queues {names}, not {table!r}: '
        'another network, unroll length or environment?'
      )
    self._connection = connection
    return connection

  def _disconnect(self) -> None:
    if self._connection is not None:
      self._connection.close()
    self._connection = self._pending = None

  def _confirm(self, connection: reverb_native.Connection, deadline: float) -> None:
    """Waits until the learner's queue took the pending row."""
    blocked = False
    asked = time.monotonic()
    while not connection.flush(min(deadline - time.monotonic(), _SLICE)):
      blocked = True
      if self._closed:
        raise transport.Closed('the writer was closed')
      now = time.monotonic()
      if now >= deadline or now - asked > _ANSWER:
        self._check_server(connection)
        asked = now
      if now >= deadline:
        raise TimeoutError
    if blocked:
      self._check_server(connection)
    self._pending = None

  def _check_server(self, connection: reverb_native.Connection) -> None:
    """Raises ConnectionError unless the learner answers and is not closing."""
    tables = connection.tables(_ANSWER)
    if any(t.name == _CLOSING and t.size for t in tables):
      raise ConnectionError('it is closing')
