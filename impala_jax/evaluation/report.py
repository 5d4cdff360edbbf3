"""What an evaluation says: statistics of each level, scores of the suite, all as JSON.

Confidence intervals are at 95 %: of a level's mean return by Student's t, which allows
for few episodes; of the suite's scores by bootstrap over the episodes of each level,
since a score is no plain mean where levels are capped.
"""

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from impala_jax import config as config_lib
from impala_jax.environments import registry
from impala_jax.evaluation import evaluator, playing
from impala_jax.reporting import episodes
from impala_jax.runtime import versions

_FORMAT = 1
_DRAWS = 2_000
_TAIL = 0.025  # Of 95 %, on each side.
_METHODS = {
  'level': '95 %, Student t for the mean return, over episodes',
  'scores': f'95 %, bootstrap over the episodes of each level, {_DRAWS} draws',
}


def statistics(returns: Sequence[float]) -> dict[str, Any]:
  """Mean, its standard error and confidence interval, median, min, max.

  The error and the interval are None for fewer than two episodes, all for none.
  """
  from scipy import special  # A dependency of JAX.

  count = len(returns)
  names = ('mean', 'standard_error', 'ci95', 'median', 'min', 'max')
  out: dict[str, Any] = {'episodes': count, **dict.fromkeys(names)}
  if count:
    values = np.asarray(returns, np.float64)
    mean = float(values.mean())
    out |= {
      'mean': mean,
      'median': float(np.median(values)),
      'min': float(values.min()),
      'max': float(values.max()),
    }
    if count > 1:
      error = float(values.std(ddof=1) / np.sqrt(count))
      reach = float(special.stdtrit(count - 1, 1 - _TAIL)) * error
      out |= {'standard_error': error, 'ci95': [mean - reach, mean + reach]}
  return out


def bootstrap(
  returns: Mapping[str, Sequence[float]],
  scores: Callable[[Mapping[str, float]], dict[str, float]],
  seed: int = 0,
) -> dict[str, list[float]]:
  """Confidence intervals of scores that are made of the mean returns of levels.

  Each draw takes as many episodes of each level as there are, with replacement.

  Args:
    returns: by level. Empty results where a level has fewer than two.
    scores: of the mean returns by level; has the same names in all draws.
    seed: of the draws.
  """
  if not returns or min(map(len, returns.values())) < 2:
    return {}
  rng = np.random.default_rng(seed)
  means = {
    level: rng.choice(np.asarray(r, np.float64), (_DRAWS, len(r))).mean(axis=1)
    for level, r in returns.items()
  }
  draws = [
    scores({level: float(m[i]) for level, m in means.items()}) for i in range(_DRAWS)
  ]
  return {
    name: np.quantile([d[name] for d in draws], [_TAIL, 1 - _TAIL]).tolist()
    for name in draws[0]
  }


def make(
  config: config_lib.Config,
  policy: evaluator.SavedPolicy,
  results: Sequence[playing.LevelResult],
  **settings: Any,
) -> dict[str, Any]:
  """The whole report, to be written as JSON.

  Scores count levels that were played to the end alone: those that failed or were
  cut off are missing, and what a suite makes of that is its own matter.

  Args:
    config: of the run.
    policy: that was evaluated.
    results: of `playing.play_levels`.
    **settings: go into the report as they are: episodes, seed, greedy, ...
  """
  levels = config.environment.levels
  returns = {levels[r.task_id]: r.returns for r in results if r.complete}
  scores = lambda means: episodes.suite_scores(config, means)
  means = {level: float(np.mean(r)) for level, r in returns.items()}
  intervals = bootstrap(returns, scores)
  return {
    'format': _FORMAT,
    'complete': all(r.complete for r in results),
    'date': datetime.datetime.now().astimezone().isoformat(timespec='seconds'),
    'run': config.name,
    'checkpoint': {
      'path': str(policy.path),
      **{k: policy.metadata.get(k) for k in ('updates', 'frames', 'wall_seconds')},
    },
    **settings,
    'scores': {
      name: {'value': value, 'ci95': intervals.get(name)}
      for name, value in scores(means).items()
    },
    'levels': dict(_level(config, result) for result in results),
    'confidence': _METHODS,
    'versions': versions.installed(),
    'config': config_lib.to_dict(config),
  }


def _level(
  config: config_lib.Config, result: playing.LevelResult
) -> tuple[str, dict[str, Any]]:
  """Name of the level that was played, and its part of the report."""
  trained_on = config.environment.levels[result.task_id]
  known = registry.reference(config.environment.suite, trained_on)
  found = statistics(result.returns)
  part: dict[str, Any] = {
    'trained_on': trained_on,
    'complete': result.complete,
    'planned_episodes': result.planned,
    **found,
    'random': known.random,
    'reference': known.full,
    'reference_is': known.full_is or None,
    'score': None,
    'score_ci95': None,
  }
  if known.full is not None and found['episodes']:
    part['score'] = known.score(found['mean'])
    if found['ci95'] is not None:
      part['score_ci95'] = [known.score(x) for x in found['ci95']]
  lengths = [e.length for e in result.episodes]
  part |= {
    'mean_agent_steps': float(np.mean(lengths)) if lengths else None,
    # Null where nobody can tell.
    'ended_by_time_limit': (
      sum(e.truncated for e in result.episodes)
      if registry.tells_time_limits(config.environment.suite)
      else None
    ),
    'engine_failures': [f.cause for f in result.failures],
    'error': result.error or None,
    'returns': result.returns,
  }
  return known.name, part
