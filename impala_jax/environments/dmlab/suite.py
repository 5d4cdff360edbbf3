"""The suite `dmlab`: levels of DeepMind Lab, each environment in its own process."""

import dataclasses
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from impala_jax import config as config_lib
from impala_jax import types
from impala_jax.environments import engine_settings as engines
from impala_jax.environments import instruction_ids, level_names, registry
from impala_jax.environments.dmlab import actions as dmlab_actions
from impala_jax.environments.dmlab import environment as dmlab
from impala_jax.environments.dmlab import levels as dmlab30
from impala_jax.environments.engines import pool as process_pool
from impala_jax.settings import (
  KEPT,
  NOT_NEGATIVE,
  at_least,
  at_most,
  multiple_of,
  one_of,
  setting,
)

GROUP = 'dmlab30'  # As a level it stands for the 30 training levels.
_MAKER = 'impala_jax.environments.dmlab.environment:make'
# Of the engine's own folder of levels; any path with a folder is taken as it is.
_OTHERS = (
  'lt_chasm',
  'lt_hallway_slope',
  'lt_horseshoe_color',
  'lt_space_bounce_hard',
  'nav_maze_random_goal_01',
  'nav_maze_random_goal_02',
  'nav_maze_random_goal_03',
  'nav_maze_static_01',
  'nav_maze_static_02',
  'nav_maze_static_03',
  'seekavoid_arena_01',
  'stairway_to_melon',
)
_KNOWN = tuple(
  dict.fromkeys((*dmlab30.TRAINING_LEVELS, *dmlab30.TEST_LEVELS, *_OTHERS))
)


@dataclasses.dataclass(frozen=True)
class Settings(engines.EngineSettings):
  """What levels are played with, and where their data are."""

  action_set: str = setting(
    'default',
    'The agent has this set of actions, see `environments.dmlab.actions`.',
    one_of(dmlab_actions.names()),
    kept=KEPT,
  )
  action_repeat: int = setting(
    4,
    'An action lasts so many frames. 60 are a second of game time.',
    at_least(1),
    at_most(1000),
  )
  frame_width: int = setting(
    96, 'A frame is so many pixels wide.', multiple_of(4), at_most(4096), kept=KEPT
  )
  frame_height: int = setting(
    72, 'A frame is so many pixels high.', multiple_of(4), at_most(4096), kept=KEPT
  )
  skip_unavailable_levels: bool = setting(
    False, 'Levels that lack their data are left out. Else they are refused.'
  )
  dataset_path: str = setting(
    '', 'This directory holds the pictures that two psychlab levels show.'
  )
  level_cache: str = setting(
    '', "This directory holds compiled maps. '' is one in the user's cache folder."
  )
  level_cache_gib: float = setting(
    10.0,
    'The level cache holds so many GiB. With 0 there is none.',
    NOT_NEGATIVE,
    at_most(1e6),
  )
  episode_seeds: int = setting(
    0,
    'Training episodes draw from so many seeds, so that maps come again and the level '
    'cache has them. With 0 they draw from all 2^31.',
    NOT_NEGATIVE,
    at_most(2**31),
  )


def engine_settings(config: config_lib.Config, evaluation: bool) -> dict[str, Any]:
  """The arguments of `dmlab.DmLab`, but for level and seed."""
  settings = config.of_suite(Settings)
  return {
    'action_set': settings.action_set,
    'action_repeat': settings.action_repeat,
    'width': settings.frame_width,
    'height': settings.frame_height,
    'evaluation': evaluation,
    'level_cache': settings.level_cache,
    'level_cache_gib': settings.level_cache_gib,
    'episode_seeds': 0 if evaluation else settings.episode_seeds,
    'dataset_path': settings.dataset_path,
  }


def played(level: str, evaluation: bool) -> str:
  """The version of a level that is played: the one for tests in evaluation.

  Raises:
    ConfigError: the level is held out, and this is no evaluation.
  """
  if evaluation:
    return dmlab30.tested_on(level)
  known = dmlab30.find(level)
  if known and known.train != level.removeprefix(dmlab30.PREFIX):
    raise config_lib.ConfigError(
      f'level {level!r} is held out for evaluation: train on {known.train}, which is '
      f'evaluated on {known.test}'
    )
  return level


def problem(level: str) -> str | None:
  """Why there is no such level, or None where there is one."""
  name = level.removeprefix(dmlab30.PREFIX)
  inside = name != level
  if (inside and dmlab30.find(name)) or (not inside and '/' in level):
    return None
  if not inside and level in _KNOWN:
    return None
  near = level_names.near(name, (GROUP, *_KNOWN))
  hint = (
    f'did you mean {", ".join(near)}?' if near else f'known are {", ".join(_KNOWN)}'
  )
  return f'unknown DeepMind Lab level {level!r}: {hint}'


def missing() -> str:
  """How to get the engine, empty where it is installed."""
  if importlib.util.find_spec('deepmind_lab') is not None:
    return ''
  return (
    f'{dmlab.NOT_INSTALLED}\nWithout it, --suite=doom trains on several first-person '
    'levels by the same code.'
  )


def resolve(config: config_lib.Config) -> config_lib.Config:
  """Writes out `dmlab30`; with `skip_unavailable_levels` drops levels without pictures.

  Raises:
    ConfigError: pictures are missing, a level is held out, or there twice by its two
      names.
  """
  settings = config.of_suite(Settings)
  levels: list[str] = []
  for level in config.environment.levels:
    levels += dmlab30.TRAINING_LEVELS if level == GROUP else [level]
  levels = list(dict.fromkeys(levels))  # A level may be named beside its group.
  by_path: dict[str, str] = {}
  for level in levels:
    played(level, evaluation=False)
    before = by_path.setdefault(dmlab.level_path(level), level)
    if before != level:
      raise config_lib.ConfigError(
        f'levels {before!r} and {level!r} are one: name it once'
      )
  lacking = {x: dmlab.picture_problem(x, settings.dataset_path) for x in levels}
  left = [x for x in levels if not lacking[x]]
  if len(left) < len(levels):
    reasons = [text for text in lacking.values() if text]
    if not settings.skip_unavailable_levels:
      reasons.append('or leave such levels out: dmlab.skip_unavailable_levels')
    if not settings.skip_unavailable_levels or not left:
      raise config_lib.ConfigError('\n'.join(reasons))
    out = ', '.join(x for x in levels if lacking[x])
    logging.getLogger(__name__).warning(
      'left out, as dmlab.skip_unavailable_levels says: %s (no pictures)', out
    )
  environment = dataclasses.replace(config.environment, levels=tuple(left))
  return dataclasses.replace(config, environment=environment)


def _lacking(config: config_lib.Config) -> list[str]:
  folder = dmlab.levels_folder()
  if folder is None:
    return []
  paths = {x: folder / f'{dmlab.level_path(x)}.lua' for x in config.environment.levels}
  return [
    f'level {level!r} is not among those of the engine: there is no {path}'
    for level, path in paths.items()
    if not path.is_file()
  ]


def _spec(config: config_lib.Config) -> types.EnvironmentSpec:
  settings = config.of_suite(Settings)
  frame = (settings.frame_height, settings.frame_width, 3)
  return types.EnvironmentSpec(
    {
      'frame': types.ArraySpec(frame, np.dtype(np.uint8)),
      'instruction': types.ArraySpec((instruction_ids.LENGTH,), np.dtype(np.int32)),
    },
    len(dmlab_actions.table(settings.action_set)),
  )


def _make(
  config: config_lib.Config, tasks: Sequence[int], evaluation: bool
) -> process_pool.ProcessPool:
  settings = config.of_suite(Settings)
  shared = engine_settings(config, evaluation)
  levels = [played(level, evaluation) for level in config.environment.levels]
  engines = [
    process_pool.EngineSpec(_MAKER, {'level': level, **shared}, level)
    for level in levels
  ]
  return process_pool.ProcessPool(
    [engines[task] for task in tasks],
    tasks,
    _spec(config),
    # In an evaluation a level is played or it is not.
    others=None if evaluation else dict(enumerate(engines)),
    max_ready=0 if evaluation else config.actor.inference_batch,
    step_timeout=settings.step_timeout,
    reset_timeout=settings.reset_timeout,
    max_restarts=settings.engine_restarts,
  )


SUITE = registry.Suite(
  make=_make,
  spec=_spec,
  problem=problem,
  scene=lambda config, task: _make(config, [task], True),
  resolve=resolve,
  scores=dmlab30.scores,
  reference=dmlab30.reference,
  settings=Settings,
  lacking=_lacking,
  tells_time_limits=False,
  missing=missing,
  levels=lambda: [GROUP, *_KNOWN],
)
