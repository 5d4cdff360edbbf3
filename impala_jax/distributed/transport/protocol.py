"""The protocol by which unrolls travel from actors to a learner.

Rows are the bytes of `unroll_layout.UnrollLayout`. Three implementations hold to
the same contract (`tests/distributed/transport/transport_contract.py`): `local` (one
process), `tcp` and `reverb` (any number of machines). Rows of one writer arrive in
order. The queue is bounded: a full one holds its writers back. Every call has a
deadline. Nothing is lost without being counted: a reader sees gaps in
the sequence numbers of each (actor, incarnation) from the first one it received. What
no actor can have meant is refused alone, counted by sender, and harms no other row.
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from impala_jax import types, unroll_layout
from impala_jax.runtime import refusals

# By so many unrolls the numbers of a writer may jump, ahead or back.
_WINDOW = 256
# So many in a row from elsewhere may be the writer itself.
_CONVINCING = 3
_MOST_TRACKS, _MOST_ELSEWHERE = 4, 16  # Of one writer.
_MOST_WRITERS = 4096
_END = 2**48  # Of sequence numbers: no actor gets so far.


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
  refused: int = 0  # Sound, but of numbers that no actor can have meant.


@dataclasses.dataclass
class WriterStats:
  """What a reader counted of one actor process, in unrolls.

  `next - first` = received + stale + lost + refused, whatever the queue held when it
  ended.
  """

  actor: int
  incarnation: int
  first: int  # Sequence number of the first that came.
  next: int  # One above that of the last.
  received: int = 0
  lost: int = 0
  stale: int = 0
  refused: int = 0


class Implausible(ValueError):
  """A header that no writer can have made; says why."""


class _Track:
  """Numbers of one writer that follow each other."""

  def __init__(self, stats: WriterStats):
    self.stats = stats
    # Numbers behind `stats.next` that have not come. The first may be forged, and the
    # writer's own first one still to come.
    self.missing = set(range(max(0, stats.next - _WINDOW), stats.next))

  def take(self, sequence: int) -> int | None:
    """How many more are lost, below 0 where one was found; None if it came before."""
    seen = self.stats
    if sequence >= seen.next:
      lost = sequence - seen.next
      self.missing.update(range(seen.next, sequence))
      seen.next = sequence + 1
      if len(self.missing) > 2 * _WINDOW:
        self.missing = {n for n in self.missing if n >= seen.next - _WINDOW}
    elif sequence in self.missing:
      self.missing.remove(sequence)
      lost = seen.first - sequence - 1 if sequence < seen.first else -1
      seen.first = min(seen.first, sequence)
    else:
      return None
    seen.lost += lost
    return lost


class _Writer:
  """What is known of one writer: where it is, and where forged numbers say it is."""

  def __init__(self) -> None:
    self.tracks: list[_Track] = []  # Longest silent first.
    # How many from elsewhere came in a row, by the number that would come next.
    self.elsewhere: dict[int, int] = {}


class SequenceTracker:
  """Counts lost and repeated unrolls by the sequence numbers of each writer.

  Counting begins with the first unroll seen of an (actor, incarnation): actors
  that outlive a learner go on with their numbers at the next one. No forged number
  makes the writer's own count as repeated: one that jumps far is refused, and so is all
  but what goes on from it several times.
  """

  def __init__(self) -> None:
    # Longest silent first.
    self._writers: collections.OrderedDict[tuple[int, int], _Writer]
    self._writers = collections.OrderedDict()

  def observe(
    self, header: npt.NDArray[np.void], stats: ReaderStats
  ) -> WriterStats | None:
    """Counts `lost` and `duplicated`; None for an unroll that came before.

    Raises:
      Implausible: its numbers are none, or too far from all others of the writer.
    """
    key = (int(header['actor_id']), int(header['incarnation']))
    sequence = int(header['sequence'])
    if min(key) < 0 or not 0 <= sequence < _END:
      raise Implausible(f'actor, incarnation and sequence are {(*key, sequence)}')
    writer = self._writers.get(key)
    if writer is None:
      writer = self._writers[key] = _Writer()
      if len(self._writers) > _MOST_WRITERS:
        self._writers.popitem(last=False)
    self._writers.move_to_end(key)
    track = self._track(writer, key, sequence)
    lost = track.take(sequence)
    if lost is None:
      stats.duplicated += 1
      return None
    stats.lost += lost
    return track.stats

  def writers(self) -> list[WriterStats]:
    """Copies."""
    return [
      dataclasses.replace(track.stats)
      for writer in self._writers.values()
      for track in writer.tracks
    ]

  def _track(self, writer: _Writer, key: tuple[int, int], sequence: int) -> _Track:
    """Of which a number is; the newest one last."""
    tracks = writer.tracks
    for i, track in enumerate(tracks):
      if abs(sequence - track.stats.next) <= _WINDOW:
        tracks.append(tracks.pop(i))
        return track
    if tracks:
      in_a_row = writer.elsewhere.pop(sequence, 0) + 1
      if in_a_row < _CONVINCING:
        writer.elsewhere[sequence + 1] = in_a_row
        if len(writer.elsewhere) > _MOST_ELSEWHERE:
          del writer.elsewhere[next(iter(writer.elsewhere))]
        last = tracks[-1].stats.next - 1
        raise Implausible(f'sequence is {sequence}, the last one was {last}')
    tracks.append(_Track(WriterStats(*key, sequence, sequence)))
    if len(tracks) > _MOST_TRACKS:
      del tracks[0]
    return tracks[-1]


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
  refusals: refusals.Refusals  # Of rows, by actor; without stale and repeated ones.

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

  def refuse_newer(self, version: int) -> None:
    """From now on unrolls of parameters after `version` are refused: nobody has them.

    Without a call none are.
    """

  def stats(self) -> ReaderStats:
    """A copy of the counts. May be called from any thread."""

  def writers(self) -> list[WriterStats]:
    """Copies of the counts by writer. May be called from any thread."""

  def close(self) -> None:
    """Stops accepting; blocked readers and writers return with `Closed` or
    `TransportError`. Idempotent, bounded in time."""
