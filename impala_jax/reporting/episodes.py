"""Returns of a run's episodes, and what its suite makes of them."""

import collections
from collections.abc import Mapping, Sequence, Set

import numpy as np

from impala_jax import config as config_lib
from impala_jax.environments import registry


class EpisodeLog:
  """Returns of finished episodes by level, over a sliding window.

  Args:
    levels: of the run.
    window: the newest so many episodes of each level count, however often others
      end: scores of suites are means over levels of such means.

  Attributes:
    count: of all episodes.
    lost: indices of levels that are played no more: their last returns stand for
      nothing, so that the means are without them.
  """

  def __init__(self, levels: Sequence[str], window: int = 100):
    self._levels = tuple(levels)
    self._recent = [
      collections.deque[tuple[float, float]](maxlen=window) for _ in levels
    ]
    self.count = 0
    self.lost: Set[int] = frozenset()

  def add(self, task_id: int, episode_return: float, length: float) -> None:
    self._recent[task_id].append((episode_return, length))
    self.count += 1

  def means(self) -> dict[str, float]:
    """Mean return over the window, of each level with an episode that ended."""
    return {
      self._levels[task]: float(np.mean([r for r, _ in recent]))
      for task, recent in self._played()
    }

  def mean(self) -> tuple[float, float] | None:
    """Return and length (agent steps) over the window, as means over levels."""
    means = [np.mean(recent, axis=0) for _, recent in self._played()]
    if not means:
      return None
    episode_return, length = np.mean(means, axis=0).tolist()
    return episode_return, length

  def _played(self) -> list[tuple[int, Sequence[tuple[float, float]]]]:
    return [
      (task, recent)
      for task, recent in enumerate(self._recent)
      if recent and task not in self.lost
    ]


def suite_scores(
  config: config_lib.Config, mean_returns: Mapping[str, float]
) -> dict[str, float]:
  """Scores of the whole suite; empty where it has none, or for one's own levels."""
  try:
    return registry.scores(config, mean_returns)
  except config_lib.ConfigError:  # An environment that was handed over, not named.
    return {}
