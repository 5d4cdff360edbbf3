"""DMLab-30: its levels, and the human-normalised scores that are published for it.

The score of a level is 100 · (r − random) / (human − random) for its mean return r:
random play has 0 and people have 100. The score of the suite is the mean over all 30
levels, where each counts for at most 100 ("mean capped") or as it is ("mean uncapped").
"""

from collections.abc import Mapping
from typing import NamedTuple

from impala_jax.environments import scoring

# Of the levels' paths in DeepMind Lab; names with it are understood, too.
PREFIX = 'contributed/dmlab30/'


class Level(NamedTuple):
  """A level, and the mean returns of random play and of people on its test version."""

  train: str
  test: str  # The same as `train`, but for two levels with held-out objects.
  random: float
  human: float


def _level(test: str, random: float, human: float) -> Level:
  held_out = test.endswith('_test')
  train = test.removesuffix('_test') + '_train' if held_out else test
  return Level(train, test, random, human)


LEVELS = (
  _level('rooms_collect_good_objects_test', 0.073, 10.0),
  _level('rooms_exploit_deferred_effects_test', 8.501, 85.65),
  _level('rooms_select_nonmatching_object', 0.312, 65.9),
  _level('rooms_watermaze', 4.065, 54.0),
  _level('rooms_keys_doors_puzzle', 4.135, 53.8),
  _level('language_select_described_object', -0.07, 389.5),
  _level('language_select_located_object', 1.929, 280.7),
  _level('language_execute_random_task', -5.913, 254.05),
  _level('language_answer_quantitative_question', -0.33, 184.5),
  _level('lasertag_one_opponent_small', -0.224, 12.65),
  _level('lasertag_three_opponents_small', -0.214, 18.55),
  _level('lasertag_one_opponent_large', -0.083, 18.6),
  _level('lasertag_three_opponents_large', -0.102, 31.5),
  _level('natlab_fixed_large_map', 2.173, 36.9),
  _level('natlab_varying_map_regrowth', 2.989, 24.45),
  _level('natlab_varying_map_randomized', 7.346, 42.35),
  _level('skymaze_irreversible_path_hard', 0.1, 100.0),
  _level('skymaze_irreversible_path_varied', 14.4, 100.0),
  _level('psychlab_arbitrary_visuomotor_mapping', 0.163, 58.75),
  _level('psychlab_continuous_recognition', 0.224, 58.3),
  _level('psychlab_sequential_comparison', 0.129, 39.5),
  _level('psychlab_visual_search', 0.085, 78.5),
  _level('explore_object_locations_small', 3.575, 74.45),
  _level('explore_object_locations_large', 4.673, 65.65),
  _level('explore_obstructed_goals_small', 6.76, 206.0),
  _level('explore_obstructed_goals_large', 2.61, 119.5),
  _level('explore_goal_locations_small', 7.66, 267.5),
  _level('explore_goal_locations_large', 3.14, 194.5),
  _level('explore_object_rewards_few', 2.073, 77.7),
  _level('explore_object_rewards_many', 2.438, 106.7),
)
TRAINING_LEVELS = tuple(x.train for x in LEVELS)
TEST_LEVELS = tuple(x.test for x in LEVELS)
_BY_NAME = {name: x for x in LEVELS for name in (x.train, x.test)}


def find(level: str) -> Level | None:
  """The level of this name, that of its training or of its test version."""
  return _BY_NAME.get(level.removeprefix(PREFIX))


def reference(level: str) -> scoring.Reference | None:
  """What is published of a level; None for one that is not of the suite."""
  found = find(level)
  if found is None:
    return None
  return scoring.Reference(found.test, found.random, found.human, 'human')


def tested_on(level: str) -> str:
  """The version that `level` is tested on; any other name is returned as it is."""
  found = find(level)
  return level if found is None else found.test


def human_normalised(mean_returns: Mapping[str, float]) -> dict[str, float]:
  """Scores of levels, not capped, by the names of their test versions.

  Args:
    mean_returns: mean return by level. A training version counts for its test
      version.

  Raises:
    ValueError: a level is unknown, or is there in both versions.
  """
  known = {name: reference(name) for name in mean_returns}
  if unknown := [name for name, found in known.items() if found is None]:
    raise ValueError(f'not levels of DMLab-30: {", ".join(unknown)}')
  scores: dict[str, float] = {}
  for name, found in known.items():
    assert found is not None
    if found.name in scores:
      raise ValueError(f'{found.name} is there twice, by its training version, too')
    score = found.score(float(mean_returns[name]))
    assert score is not None
    scores[found.name] = score
  return scores


def suite_scores(mean_returns: Mapping[str, float]) -> dict[str, float]:
  """`mean_capped` and `mean_uncapped` over the 30 levels, as published.

  Args:
    mean_returns: see `human_normalised`; of all 30 levels.

  Raises:
    ValueError: a level is missing (all that are missing are named), unknown, or
      there twice.
  """
  by_level = human_normalised(mean_returns)
  missing = [name for name in TEST_LEVELS if name not in by_level]
  if missing:
    raise ValueError(
      f'the score of DMLab-30 needs all {len(LEVELS)} levels; missing: '
      + ', '.join(missing)
    )
  return scoring.of_suite(by_level.values(), len(LEVELS))


def scores(mean_returns: Mapping[str, float]) -> dict[str, float]:
  """The suite's scores while a run goes on: never an error.

  What `suite_scores` says where all 30 levels are there. Where some are missing, the
  capped mean over those that are there, under the name `partial_mean_capped`, and
  their number, `partial_levels`: it compares with nothing that is published. Other
  levels do not count. Empty where no level of the suite is there, or where one is
  there in both versions.
  """
  known = {name: mean for name, mean in mean_returns.items() if find(name)}
  if len({tested_on(name) for name in known}) < len(known):
    return {}
  return scoring.of_suite(human_normalised(known).values(), len(LEVELS))
