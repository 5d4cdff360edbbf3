"""What a soak concludes from what it saw: pure arithmetic on samples and records."""

import collections
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

WARM_UP = 60.0  # Seconds of a process that say nothing on how its memory grows.
_MOST_POINTS = 300  # Of one process, in a slope.


def slope_per_hour(
  samples: Iterable[Mapping[str, float]], field: str, warm_up: float = WARM_UP
) -> dict[str, float] | None:
  """How fast a figure grows within the life of processes; robust against outliers.

  The median of the slopes between all pairs of samples of one process, weighted by
  their distance in time, over all processes together (Theil and Sen). Processes that
  begin at different heights do not count as growth.

  Args:
    samples: of any number of processes, each with `pid`, `born`, `time` (seconds) and
      `field`.
    field: which figure.
    warm_up: seconds after its birth of which a process's samples are left out.

  Returns:
    `per_hour`, `hours` (of observation behind it) and `processes`; None where no
    process was seen twice after its warm-up.
  """
  lives = collections.defaultdict(list)
  for s in samples:
    if s['time'] - s['born'] >= warm_up:
      lives[s['pid'], s['born']].append((s['time'], s[field]))
  slopes, weights, seconds, count = [], [], 0.0, 0
  for life in lives.values():
    points = np.array(sorted(life))
    if len(points) > _MOST_POINTS:
      keep = np.linspace(0, len(points) - 1, _MOST_POINTS).astype(int)
      points = points[keep]
    i, j = np.triu_indices(len(points), 1)
    apart = points[j, 0] - points[i, 0]
    i, j, apart = i[apart > 0], j[apart > 0], apart[apart > 0]
    if len(apart) == 0:
      continue
    slopes.append((points[j, 1] - points[i, 1]) / apart * 3600)
    weights.append(apart)
    seconds += points[-1, 0] - points[0, 0]
    count += 1
  if not slopes:
    return None
  slope, weight = np.concatenate(slopes), np.concatenate(weights)
  order = np.argsort(slope)
  middle = np.searchsorted(np.cumsum(weight[order]), weight.sum() / 2)
  return {
    'per_hour': float(slope[order][middle]),
    'hours': seconds / 3600,
    'processes': count,
  }


def halts(
  progress: Sequence[float],
  faults: Sequence[tuple[float, str]],
  start: float,
  end: float,
) -> list[dict[str, Any]]:
  """Times without progress, the longest first.

  Args:
    progress: times of progress, seconds, ascending.
    faults: times and names, ascending.
    start: of the time looked at.
    end: of it.

  Returns:
    Of each gap `seconds`, `at` (seconds since `start`), and `faults`, those between
    the one before the gap and its end: a learner trains on for a moment on what its
    queue still holds.
  """
  times = [start, *(t for t in progress if start < t < end), end]
  found = []
  for a, b in itertools.pairwise(times):
    before = [name for t, name in faults if t <= a][-1:]
    within = [name for t, name in faults if a < t < b]
    found.append({'seconds': b - a, 'at': a - start, 'faults': before + within})
  return sorted(found, key=lambda h: -h['seconds'])


class Seen(NamedTuple):
  """What one learner process counted of one actor process.

  Attributes:
    first: sequence number of the first unroll that came.
    next: one above that of the last.
    received: put into batches.
    lost: numbers skipped in between.
    stale: refused for their age.
    refused: for what they held.
  """

  first: int
  next: int
  received: int
  lost: int
  stale: int
  refused: int = 0


# Of an actor process: index and incarnation.
Writer = tuple[int, int]


def balance(
  ledgers: Sequence[Mapping[Writer, Seen]], reported: Mapping[Writer, int]
) -> dict[str, Any]:
  """Where every unroll of every actor process went.

  Of each actor process, over the learner processes that saw it, one after another:

    sent = received + stale + refused + lost + gone - repeated + unheard

  `gone` are numbers between the last that one learner counted and the first that its
  successor did: what was in the queue, or not yet counted, when a learner died.
  `repeated` were sent to two learners, because the first did not confirm. `unheard`
  were reported as sent, but neither they nor any later unroll were counted.
  Reports may be two seconds old, so `sent` is the greater of the report and of what
  came; the one unroll that an actor had in its hands when it was killed is not sent.

  Args:
    ledgers: the last counts of each learner process, oldest first; of learners that
      run side by side each has actors of its own.
    reported: how many unrolls each actor process last said it had sent.

  Returns:
    The sums, the greatest `gone` of one actor at one change of learners, and
    `unbalanced`: counts that contradict each other, in words.
  """
  sums = dict.fromkeys(
    ('sent', 'received', 'stale', 'refused', 'lost', 'gone', 'repeated', 'unheard'), 0
  )
  most_gone, unbalanced = 0, []
  after: dict[Writer, int] = {}
  for ledger in ledgers:
    for key, seen in ledger.items():
      came = seen.received + seen.stale + seen.refused
      if seen.next - seen.first != came + seen.lost:
        unbalanced.append(f'actor {key[0]}, incarnation {key[1]}: {seen}')
      gap = seen.first - after.get(key, 0)
      sums['gone'] += max(gap, 0)
      sums['repeated'] += max(-gap, 0)
      most_gone = max(most_gone, gap)
      for name in ('received', 'stale', 'refused', 'lost'):
        sums[name] += getattr(seen, name)
      after[key] = seen.next
  writers = {*after, *reported}
  for key in writers:
    sent = max(after.get(key, 0), reported.get(key, 0))
    sums['sent'] += sent
    sums['unheard'] += sent - after.get(key, 0)
  return {
    **sums,
    'actor_processes': len(writers),
    'most_gone_of_one_actor': most_gone,
    'unbalanced': unbalanced,
  }


def updates_redone(records: Sequence[Mapping[str, Any]]) -> list[int]:
  """Updates lost with each learner that went on from an older checkpoint."""
  falls = [a['updates'] - b['updates'] for a, b in itertools.pairwise(records)]
  return [int(f) for f in falls if f > 0]
