"""The protocol by which unrolls travel from actors to a learner.

Rows are the bytes of `unroll_layout.UnrollLayout`. Two implementations hold to
the same contract (`tests/distributed/transport/transport_contract.py`): `local` (one
process) and `reverb` (any number of machines). Rows of one writer arrive in order. The
queue is bounded: a full one holds its writers back. Every
call has a deadline. Nothing is lost without being counted: a reader sees gaps in
the sequence numbers of each (actor, incarnation) from the first one it received.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from impala_jax import types, unroll_layout


class TransportError(Exception):
  """The other side is gone or refuses; the caller may try again later."""


class Closed(TransportError):
  """This side was closed: no call will succeed again."""


@dataclasses.dataclass
class ReaderStats:
  """Totals since the start, in unrolls."""

  received: int = 0  # Sound, new, and put into a batch.
  corrupted: int = 0  # Refused by checksum or layout; most are `lost`, too.
  lost: int = 0  # Sequence numbers skipped.
  duplicated: int = 0  # Sequence numbers seen before; not handed on.
  stale: int = 0  # Of older parameters than asked for; not handed on.
  queued: int = 0  # Waiting now.
  capacity: int = 0  # How many may wait.


@dataclasses.dataclass
class WriterStats:
  """What a reader counted of one actor process, in unrolls.

  `next - first` = received + stale + `lost`, whatever the queue held when it ended.
  """

  actor: int
  incarnation: int
  first: int  # Sequence number of the first that came.
  next: int  # One above that of the last.
  received: int = 0
  lost: int = 0
  stale: int = 0


class SequenceTracker:
  """Counts lost and repeated unrolls by the sequence numbers of each writer.

  Counting begins with the first unroll seen of an (actor, incarnation): actors
  that outlive a learner go on with their numbers at the next one.
  """

  def __init__(self) -> None:
    self._writers: dict[tuple[int, int], WriterStats] = {}

  def observe(
    self, header: npt.NDArray[np.void], stats: ReaderStats
  ) -> WriterStats | None:
    """Counts `lost` and `duplicated`; None for an unroll that came before."""
    key = (int(header['actor_id']), int(header['incarnation']))
    sequence = int(header['sequence'])
    writer = self._writers.get(key)
    if writer is None:
      writer = self._writers[key] = WriterStats(*key, sequence, sequence)
    if sequence < writer.next:
      stats.duplicated += 1
      return None
    lost = sequence - writer.next
    stats.lost += lost
    writer.lost += lost
    writer.next = sequence + 1
    return writer

  def writers(self) -> list[WriterStats]:
    """Copies."""
    return [dataclasses.replace(w) for w in self._writers.values()]


class Batch:
  """`B` sound unrolls as one array.

  Attributes:
    rows: uint8 [B, nbytes], 64-byte aligned.
  """

  def __init__(self, rows: types.Rows, on_release: Callable[[], None] | None = None):
    self.rows = rows
    self._on_release = on_release

  def release(self) -> None:
    """Tells that nobody reads `rows` any more. Idempotent.

    XLA's CPU client reads `rows` in place, so release only after the update that
    uses them has finished. Three batches may be held while the next is read;
    beyond that writers are held back until one is released.
    """
    if self._on_release is not None:
      self._on_release()
      self._on_release = None


def check_row(row: types.Rows, layout: unroll_layout.UnrollLayout) -> None:
  """Raises ValueError unless `row` is uint8 [layout.nbytes]."""
  if row.dtype != np.uint8 or row.shape != (layout.nbytes,):
    raise ValueError(
      f'row is {row.dtype}{list(row.shape)}, expected uint8[{layout.nbytes}]'
    )


class Writer(Protocol):
  """The actor's side. `write` is used by one thread, `close` by any."""

  def write(self, row: types.Rows, timeout: float) -> None:
    """Sends one sealed row; `row` may be reused as soon as it returns.

    Raises:
      ValueError: the row is not of the transport's layout.
      TimeoutError: the queue stayed full; sending the same row again is right,
        and it arrives once. A row that is given up may still arrive.
      TransportError: the learner is out of reach or stopped (after a bounded
        wait). Sending the same row again is right.
      Closed: this writer was closed, or its reader in the same process.
    """

  def close(self) -> None:
    """Idempotent; does not block for longer than a few seconds."""


class Reader(Protocol):
  """The learner's side: owns the queue. Used by one thread."""

  layout: unroll_layout.UnrollLayout

  def read(self, timeout: float) -> Batch:
    """The next batch of the configured size.

    Raises:
      TimeoutError: no full batch in time; what has come is kept for later.
      Closed: `close` was called.
    """

  def refuse_older(self, version: int) -> None:
    """From now on unrolls of parameters before `version` are refused and counted.

    Those of which the next batch already consists in part stay.
    """

  def stats(self) -> ReaderStats:
    """A copy of the counts. May be called from any thread."""

  def writers(self) -> list[WriterStats]:
    """Copies of the counts by writer. May be called from any thread."""

  def close(self) -> None:
    """Stops accepting; blocked readers and writers return with `Closed` or
    `TransportError`. Idempotent, bounded in time."""
