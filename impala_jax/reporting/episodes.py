"""Returns of a run's episodes, and what its suite makes of them."""

import collections
from collections.abc import Mapping, Sequence

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
  """

  def __init__(self, levels: Sequence[str], window: int = 100):
    self._levels = tuple(levels)
    self._recent = [
      collections.deque[tuple[float, float]](maxlen=window) for _ in levels
    ]
    self.count = 0

  def add(self, task_id: int, episode_return: float, length: float) -> None:
    self._recent[task_id].append((episode_return, length))
    self.count += 1

  def means(self) -> dict[str, float]:
    """Mean return over the window, of each level with an episode that ended."""
    return {
      level: float(np.mean([r for r, _ in recent]))
      for level, recent in zip(self._levels, self._recent, strict=True)
      if recent
    }

  def mean(self) -> tuple[float, float] | None:
    """Return and length (agent steps) over the window, as means over levels."""
    means = [np.mean(r, axis=0) for r in self._recent if r]
    if not means:
      return None
    episode_return, length = np.mean(means, axis=0).tolist()
    return episode_return, length


def suite_scores(
  config: config_lib.Config, mean_returns: Mapping[str, float]
) -> dict[str, float]:
  """Scores of the whole suite; empty where it has none, or for one's own levels."""
  try:
    return registry.scores(config, mean_returns)
  except config_lib.ConfigError:  # An environment that was handed over, not named.
    return {}
