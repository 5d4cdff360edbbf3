"""Scores of levels and of suites of levels, from the returns that score 0 and 100."""

from collections.abc import Iterable
from typing import NamedTuple

_CAP = 100.0
PARTIAL_LEVELS = 'partial_levels'  # No score, but of how many levels one is.


class Reference(NamedTuple):
  """What is known beforehand of one level."""

  name: str  # Of the version that the level is tested on.
  random: float | None = None  # Mean return of random play; scores 0.
  full: float | None = None  # The return that scores 100; known where `random` is.
  full_is: str = ''  # Whose return that is.

  def score(self, mean_return: float) -> float | None:
    """100 · (r − random) / (full − random), not capped; None where unknown."""
    if self.random is None or self.full is None:
      return None
    return 100.0 * (mean_return - self.random) / (self.full - self.random)


def of_suite(scores: Iterable[float], size: int) -> dict[str, float]:
  """The figures of a suite of `size` levels from the scores of those that are there.

  Of all: `mean_capped`, where each level counts for at most 100, and `mean_uncapped`.
  Of fewer: the capped mean over these, under the name `partial_mean_capped`, since it
  compares with nothing that is published, and their number, `partial_levels`. Of none:
  nothing.
  """
  found = list(scores)
  if not found:
    return {}
  capped = _mean([min(s, _CAP) for s in found])
  if len(found) < size:
    return {'partial_mean_capped': capped, PARTIAL_LEVELS: float(len(found))}
  return {'mean_capped': capped, 'mean_uncapped': _mean(found)}


def _mean(values: list[float]) -> float:
  return sum(values) / len(values)
