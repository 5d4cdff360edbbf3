"""The transport inside one process: rows wait in preallocated slabs.

A slab is one future batch. A writer claims the next free row of the newest slab
under the lock and copies into it outside of it; the reader checks the rows where
they lie and hands the slab on without another copy.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable

import numpy as np

from impala_jax import types, unroll_layout
from impala_jax.distributed.transport import protocol as transport
from impala_jax.runtime import refusals

# One that is being completed, and three batches in the learner's hands. Pages of
# slabs that are never needed are never touched, so they take no memory.
_SPARE_SLABS = 4


class _Slab:
  """Room for one batch; rows [start, claimed) wait or are being written."""

  def __init__(self, rows: types.Rows):
    self.rows = rows
    self.reset()

  def reset(self) -> None:
    self.start = 0  # Rows before it were taken by the reader.
    self.claimed = 0
    self.written = [False] * len(self.rows)


class LocalTransport:
  """A bounded queue of rows between threads: `Reader`, and source of `Writer`s.

  A batch's slab is used again after `Batch.release`. Where batches are not
  released, writers run out of slabs and get TimeoutError; `close` still works.
  `stats().received` counts rows once a batch takes them.

  Args:
    layout: of the rows.
    batch_size: rows in a batch.
    capacity: rows that may wait, at least `batch_size`. Memory: about
      `capacity + 4 * batch_size` rows at most.
    on_room: called by the reader's thread when a full queue may have room again.

  Raises:
    ValueError: names the argument that is out of range.
  """

  def __init__(
    self,
    layout: unroll_layout.UnrollLayout,
    batch_size: int,
    capacity: int,
    on_room: Callable[[], None] = lambda: None,
  ):
    if batch_size < 1:
      raise ValueError(f'batch_size is {batch_size}: must be at least 1')
    if capacity < batch_size:
      raise ValueError(
        f'capacity is {capacity}: must be at least batch_size ({batch_size}), '
        'or no batch would ever be full'
      )
    self.layout = layout
    self._batch_size = batch_size
    self._on_room = on_room
    self._stats = transport.ReaderStats(capacity=capacity)
    self._tracker = transport.SequenceTracker()
    self.refusals = refusals.Refusals('unrolls')
    self._oldest: int | None = None  # Version of parameters that is still taken.
    self._newest: int | None = None  # The newest that anybody can have.
    lock = threading.Lock()
    self._lock = lock
    self._has_room = threading.Condition(lock)  # For writers.
    self._has_rows = threading.Condition(lock)  # For the reader.
    self._free = [
      _Slab(layout.allocate(batch_size))
      for _ in range(-(-capacity // batch_size) + _SPARE_SLABS)
    ]
    # Slabs with claimed rows that the reader has not taken, oldest first.
    self._queue: collections.deque[_Slab] = collections.deque()
    self._waiting = 0  # Claimed and not taken.
    # The batch being completed: rows [0, _sound) are checked.
    self._partial: _Slab | None = None
    self._sound = 0
    self._closed = False

  def writer(self) -> 'LocalWriter':
    """A new writer; any number may be used, each by one thread."""
    return LocalWriter(self)

  def read(self, timeout: float) -> transport.Batch:
    """See `transport.Reader`."""
    deadline = time.monotonic() + timeout
    while self._sound < self._batch_size:  # Again where rows were refused.
      with self._lock:
        self._has_rows.wait_for(
          lambda: self._closed or self._enough(), max(0.0, deadline - time.monotonic())
        )
        if self._closed:
          raise transport.Closed('the transport was closed')
        if not self._enough():
          raise TimeoutError(
            f'{self._sound + self._written_rows()} of {self._batch_size} unrolls '
            f'came within {timeout:g} s'
          )
      self._take(self._batch_size - self._sound)
    slab, self._partial, self._sound = self._partial, None, 0
    assert slab is not None
    return transport.Batch(slab.rows, lambda: self._give_back(slab))

  def refuse_older(self, version: int) -> None:
    """See `transport.Reader`."""
    self._oldest = version

  def refuse_newer(self, version: int) -> None:
    """See `transport.Reader`."""
    self._newest = version

  def stats(self) -> transport.ReaderStats:
    """See `transport.Reader`."""
    with self._lock:
      return dataclasses.replace(self._stats, queued=self._waiting + self._sound)

  def writers(self) -> list[transport.WriterStats]:
    """See `transport.Reader`."""
    with self._lock:
      return self._tracker.writers()

  def close(self) -> None:
    """See `transport.Reader`."""
    with self._lock:
      self._closed = True
      self._has_room.notify_all()
      self._has_rows.notify_all()

  def _enough(self) -> bool:
    return self._sound + self._written_rows() >= self._batch_size

  def _written_rows(self) -> int:
    """Rows that wait, from the oldest on and without a gap. Needs the lock."""
    count = 0
    for slab in self._queue:
      for i in range(slab.start, self._batch_size):
        if not slab.written[i]:
          return count
        count += 1
    return count

  def _take(self, number: int) -> None:
    """Moves the `number` oldest rows into the partial batch, if they are sound."""
    while number:
      slab = self._queue[0]  # Writers change the other end only.
      count = min(number, self._batch_size - slab.start)
      impossible = self.layout.impossible(slab.rows[slab.start : slab.start + count])
      for i in range(count):
        self._take_row(slab, impossible.get(i))
      number -= count
    self._on_room()

  def _take_row(self, slab: _Slab, impossible: str | None) -> None:
    row = slab.rows[slab.start]
    wanted = self._judge(row, impossible)
    if wanted:
      if self._partial is None:
        # As a rule the row stays where it is. It moves after a refused row,
        # until the queue runs empty once.
        self._partial = slab
      target = self._partial.rows[self._sound]
      if target.ctypes.data != row.ctypes.data:
        np.copyto(target, row)
    with self._lock:
      self._sound += wanted
      slab.start += 1
      self._waiting -= 1
      if slab.start == self._batch_size:
        self._queue.popleft()
        if slab is not self._partial:
          self._recycle(slab)
      elif self._waiting == 0 and slab is not self._partial:
        self._queue.popleft()
        self._recycle(slab)
      self._has_room.notify()

  def _judge(self, row: types.Rows, impossible: str | None) -> bool:
    """Counts a row; whether it is wanted.

    Args:
      row: uint8 [nbytes].
      impossible: what is wrong with its numbers, if it is sound otherwise.
    """
    problem = self.layout.problem(row)
    if problem is not None:
      with self._lock:
        self._stats.corrupted += 1
      self.refusals.add('unknown', problem)
      return False
    header = self.layout.header(row)
    version = int(header['version'])
    with self._lock:
      stats, why = self._stats, impossible
      try:
        writer = self._tracker.observe(header, stats)
      except transport.Implausible as e:
        writer, why = None, str(e)
      else:
        if writer is None:
          return False
        if version < 0 or (self._newest is not None and version > self._newest):
          why = f'version is {version}, the newest is {self._newest}'
        if why is None:
          stale = self._oldest is not None and version < self._oldest
          stats.stale += stale
          writer.stale += stale
          stats.received += not stale
          writer.received += not stale
          return not stale
        writer.refused += 1
      stats.refused += 1
    self.refusals.add(f'actor {int(header["actor_id"])}', why)
    return False

  def _recycle(self, slab: _Slab) -> None:
    slab.reset()
    self._free.append(slab)
    self._has_room.notify_all()

  def _give_back(self, slab: _Slab) -> None:
    with self._lock:
      self._recycle(slab)
    self._on_room()

  def _claim(self, timeout: float, writer: 'LocalWriter') -> tuple[_Slab, int]:
    with self._lock:
      room = self._has_room.wait_for(
        lambda: self._closed or writer.closed or self._room(), timeout
      )
      if self._closed or writer.closed:
        raise transport.Closed('the transport was closed')
      if not room:
        raise TimeoutError(
          f'the queue of {self._stats.capacity} unrolls stayed full for {timeout:g} s'
        )
      if not self._queue or self._queue[-1].claimed == self._batch_size:
        self._queue.append(self._free.pop())
      slab = self._queue[-1]
      index = slab.claimed
      slab.claimed += 1
      self._waiting += 1
      return slab, index

  def _room(self) -> bool:
    if self._waiting + self._sound >= self._stats.capacity:
      return False
    open_slab = self._queue and self._queue[-1].claimed < self._batch_size
    return bool(open_slab or self._free)

  def _commit(self, slab: _Slab, index: int) -> None:
    with self._lock:
      slab.written[index] = True
      if self._waiting + self._sound >= self._batch_size:  # Else it would sleep on.
        self._has_rows.notify()

  def _wake_writers(self) -> None:
    with self._lock:
      self._has_room.notify_all()


class LocalWriter:
  """See `transport.Writer`. Made by `LocalTransport.writer`."""

  def __init__(self, owner: LocalTransport):
    self._owner = owner
    self.closed = False

  def write(self, row: types.Rows, timeout: float) -> None:
    """See `transport.Writer`."""
    transport.check_row(row, self._owner.layout)
    slab, index = self._owner._claim(timeout, self)
    try:
      np.copyto(slab.rows[index], row)
    except BaseException:
      slab.rows[index, : unroll_layout.HEADER.itemsize] = 0  # The reader refuses it.
      raise
    finally:
      self._owner._commit(slab, index)

  def close(self) -> None:
    """See `transport.Writer`. The transport stays open for other writers."""
    self.closed = True
    self._owner._wake_writers()


class FedReader:
  """A reader to whose local queue something else brings the rows (`transport.Reader`).

  Subclasses close it, and count under `_malformed` what was no row at all.

  Args:
    queue: that holds the rows, and judges them.
  """

  def __init__(self, queue: LocalTransport):
    self._local = queue
    self.layout = queue.layout
    self.refusals = queue.refusals
    self._malformed = 0

  def read(self, timeout: float) -> transport.Batch:
    """See `transport.Reader`."""
    return self._local.read(timeout)

  def refuse_older(self, version: int) -> None:
    """See `transport.Reader`."""
    self._local.refuse_older(version)

  def refuse_newer(self, version: int) -> None:
    """See `transport.Reader`."""
    self._local.refuse_newer(version)

  def stats(self) -> transport.ReaderStats:
    """See `transport.Reader`."""
    stats = self._local.stats()
    stats.corrupted += self._malformed
    return stats

  def writers(self) -> list[transport.WriterStats]:
    """See `transport.Reader`."""
    return self._local.writers()
