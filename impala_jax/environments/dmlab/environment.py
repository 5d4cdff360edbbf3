"""DeepMind Lab as a `dm_env.Environment`. `deepmind_lab` is imported on use.

The engine can abort, exit or hang its process, and it never releases Python's lock:
give every `DmLab` a process of its own (`process_pool`, by `dmlab_suite`).
"""

import importlib.util
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import dm_env
import numpy as np
from dm_env import specs

from impala_jax.environments import instruction_ids
from impala_jax.environments.dmlab import actions as dmlab_actions
from impala_jax.environments.dmlab import level_cache as level_cache_lib
from impala_jax.environments.dmlab import levels as dmlab30

_FRAME = 'RGB_INTERLEAVED'
_TEXT = 'INSTR'
_SEEDS = 2**31  # The engine takes seeds below it.
# Mixed into every seed of an evaluation, so that its episodes are not those of
# training; the value that all published evaluations use.
EVALUATION_MIXER_SEED = 0x600D5EED

NOT_INSTALLED = (
  'DeepMind Lab (the Python module deepmind_lab) is not installed here. No package '
  'index has it:\nbuild the wheel as docs/users/build.md of '
  'github.com/google-deepmind/lab tells, and install it with pip.'
)

# These show photographs that do not come with the engine.
_WITH_PICTURES = frozenset(
  {'psychlab_arbitrary_visuomotor_mapping', 'psychlab_continuous_recognition'}
)
_NO_PICTURES = 'dummy'  # The engine then shows squares of one colour.
_FIRST_PICTURE = '0001.png'


def make(level: str, seed: int, **settings: Any) -> dm_env.Environment:
  """A `DmLab`, by a name for `process_pool.EngineSpec`; same arguments."""
  return DmLab(level, seed, **settings)


def level_path(level: str) -> str:
  """The engine's name of a level: those of DMLab-30 are known without their folder."""
  known = dmlab30.find(level)
  return dmlab30.PREFIX + level.removeprefix(dmlab30.PREFIX) if known else level


def levels_folder() -> pathlib.Path | None:
  """Where the installed engine has its levels; None where that is not known."""
  found = importlib.util.find_spec('deepmind_lab')
  if found is None or not found.origin:
    return None
  folder = pathlib.Path(found.origin).parent / 'baselab' / 'game_scripts' / 'levels'
  return folder if folder.is_dir() else None


def picture_problem(level: str, dataset_path: str) -> str | None:
  """Why `level` lacks its pictures, or None where it has them or needs none."""
  if level.rsplit('/', 1)[-1] not in _WITH_PICTURES or dataset_path == _NO_PICTURES:
    return None
  if dataset_path and (pathlib.Path(dataset_path) / _FIRST_PICTURE).is_file():
    return None
  return (
    f'level {level!r} shows the pictures of Brady, Konkle, Alvarez and Oliva (2008), '
    f'and dmlab.dataset_path is {dataset_path!r}: must be the directory of its '
    f'files {_FIRST_PICTURE} to 2400.png, which data/brady_konkle_oliva2008/README.md '
    'of github.com/google-deepmind/lab tells how to get'
  )


class DmLab(dm_env.Environment):
  """One level.

  Observations: `frame`, uint8 [height, width, 3], and `instruction`, int32 [16]: the
  ids of the words (`instruction_ids`) of the instruction in force, which may change in
  mid-episode; zeros where a level has none. The engine shows nothing once an episode
  is over, so a LAST step repeats the observation before it.

  Every episode ends with discount 0, although most levels end by a time limit: the
  agents of the published DMLab-30 figures were trained so. The reward of the last step
  counts. A step that the end cuts short is still one step.

  Each episode has a seed drawn from a generator seeded by `seed`. A trajectory is
  repeated only by a fresh engine with the same history of episodes: within one engine,
  the same seed gives the same map but not the same play.

  Args:
    level: a name of DMLab-30, or any path of a level of the engine.
    seed: of the seeds of episodes.
    action_set: a name of `dmlab_actions`.
    action_repeat: frames per step; 60 are a second of game time.
    width: pixels, a multiple of 4.
    height: pixels, a multiple of 4.
    evaluation: allow held-out levels, and mix the seed of evaluations into all seeds.
    level_cache: directory of compiled maps; '' for the user's cache folder.
    level_cache_gib: its bound; 0 for no cache.
    episode_seeds: episodes are seeded from [0, episode_seeds); 0 for [0, 2^31). The
      map follows from the seed, so only with a bounded number do maps come again and
      does a level cache have hits (`impala fill_level_cache`).
    dataset_path: the pictures of two psychlab levels.
    renderer: 'software' or 'hardware'.
    config: more settings of the engine or the level; they win over those above.

  Attributes:
    level: the engine's name of it.
    episode_seed: of the episode that runs, set before the engine begins it; -1 before
      the first.
    on_episode_seed: called with that seed when it is set.
    level_cache: the `LevelCache`, or None.

  Raises:
    ImportError: there is no `deepmind_lab`.
    ValueError: a setting is impossible, pictures are missing, or the engine refuses
      the level or a setting; the text says which.
    RuntimeError: the engine does not start at all.
  """

  def __init__(
    self,
    level: str,
    seed: int,
    *,
    action_set: str = 'default',
    action_repeat: int = 4,
    width: int = 96,
    height: int = 72,
    evaluation: bool = False,
    level_cache: str | os.PathLike[str] = '',
    level_cache_gib: float = 10.0,
    episode_seeds: int = 0,
    dataset_path: str = '',
    renderer: str = 'software',
    config: Mapping[str, str] | None = None,
  ):
    if action_repeat < 1:
      raise ValueError(f'action_repeat is {action_repeat}: must be at least 1')
    if not 0 <= episode_seeds <= _SEEDS:
      raise ValueError(f'episode_seeds is {episode_seeds}: must lie in [0, 2^31]')
    missing = picture_problem(level, dataset_path)
    if missing:
      raise ValueError(missing)
    self.level = level_path(level)
    self.episode_seed = -1
    self.on_episode_seed: Callable[[int], None] = lambda seed: None
    self._actions = dmlab_actions.table(action_set)
    self._repeat = action_repeat
    self._episode_seeds = episode_seeds or _SEEDS
    self._rng = np.random.default_rng(seed)
    self._over = True
    self._text = ''
    self._observation: dict[str, np.ndarray] = {}
    engine_config = {
      'width': str(width),
      'height': str(height),
      'logLevel': 'WARN',  # The engine writes anything less to stdout.
    }
    if evaluation:
      engine_config['allowHoldOutLevels'] = 'true'
      engine_config['mixerSeed'] = str(EVALUATION_MIXER_SEED)
    if dataset_path:
      engine_config['datasetPath'] = str(dataset_path)
    for key, value in (config or {}).items():
      if not isinstance(key, str) or not isinstance(value, str):
        raise ValueError(f'config[{key!r}] is {value!r}: both must be str')
      engine_config[key] = value
    self._shape = (int(engine_config['height']), int(engine_config['width']), 3)
    name = self.level.rsplit('/', 1)[-1]
    self.level_cache = level_cache_lib.open_cache(
      str(level_cache), level_cache_gib, name
    )
    self._lab: Any = self._construct(engine_config, renderer)

  def reset(self) -> dm_env.TimeStep:
    """Begins an episode; may take a minute where a map is compiled."""
    return self.begin(int(self._rng.integers(self._episode_seeds)))

  def begin(self, episode_seed: int) -> dm_env.TimeStep:
    """Begins an episode with this seed, an int in [0, 2^31).

    Raises:
      RuntimeError: the engine cannot; names level and seed.
    """
    self._check_open()
    self._over = True
    self.episode_seed = episode_seed
    self.on_episode_seed(episode_seed)
    try:
      self._lab.reset(seed=episode_seed)
    except RuntimeError as e:
      raise RuntimeError(self._words(e)) from e
    self._observe()
    self._over = False
    return dm_env.restart(self._observation)

  def step(self, action: int) -> dm_env.TimeStep:
    """Plays `action` for `action_repeat` frames; begins an episode after a LAST step.

    Raises:
      ValueError: there is no such action.
      RuntimeError: the engine cannot go on; names level and seed.
    """
    if self._over:
      return self.reset()
    self._check_open()
    if not 0 <= action < len(self._actions):
      raise ValueError(f'action is {action}: must lie in [0, {len(self._actions)})')
    try:
      reward = self._lab.step(self._actions[action], num_steps=self._repeat)
    except (RuntimeError, ValueError) as e:  # ValueError: a level's script failed.
      self._over = True
      raise RuntimeError(self._words(e)) from e
    if self._lab.is_running():
      self._observe()
      return dm_env.transition(reward, self._observation)
    self._over = True
    return dm_env.termination(reward, self._observation)

  def observation_spec(self) -> dict[str, specs.BoundedArray]:
    length, buckets = instruction_ids.LENGTH, instruction_ids.BUCKETS
    return {
      'frame': specs.BoundedArray(self._shape, np.uint8, 0, 255, 'frame'),
      'instruction': specs.BoundedArray((length,), np.int32, 0, buckets, 'instruction'),
    }

  def action_spec(self) -> specs.DiscreteArray:
    return specs.DiscreteArray(len(self._actions), np.int32, 'action')

  def frame(self) -> np.ndarray | None:
    """The picture of the last time step, uint8 [height, width, 3]."""
    return self._observation.get('frame')

  def counts(self) -> dict[str, int]:
    """What happened to the level cache; see `engines.process.COUNTS`."""
    if self.level_cache is None:
      return {}
    stats = self.level_cache.stats()
    return {
      'cache_hits': stats.hits,
      'cache_misses': stats.misses,
      'cache_evictions': stats.evictions,
      'cache_unwritable': int(not self.level_cache.writable),
    }

  def close(self) -> None:
    """Ends the engine. Idempotent: an engine that is used once closed may crash."""
    lab, self._lab = self._lab, None
    if lab is not None:
      lab.close()

  def _construct(self, config: dict[str, str], renderer: str) -> Any:
    if renderer == 'software':
      # Mesa's software renderer else starts as many threads as there are cores, for
      # tiles that a frame of 96 x 72 does not have: a tenth of a step's CPU time.
      os.environ.setdefault('LP_NUM_THREADS', '0')
    try:
      import deepmind_lab
    except ModuleNotFoundError as e:
      if e.name != 'deepmind_lab':
        raise  # It is there, and lacks something itself.
      raise ImportError(NOT_INSTALLED) from e

    def construct(observations: list[str]) -> Any:
      return deepmind_lab.Lab(
        self.level,
        observations,
        config=config,
        renderer=renderer,
        level_cache=self.level_cache,
      )

    try:
      try:
        return construct([_FRAME, _TEXT])
      except ValueError as e:
        if _TEXT not in str(e):
          raise
      return construct([_FRAME])  # Outside DMLab-30 a level need not have it.
    except RuntimeError as e:
      words = f'level {self.level!r}: {e}'
      if 'connect' in str(e):  # 'Failed to connect RL API': nothing was asked yet.
        raise RuntimeError(words) from e
      raise ValueError(words) from e

  def _observe(self) -> None:
    given = self._lab.observations()
    text = given.get(_TEXT, '')
    if text != self._text or not self._observation:
      self._text = text
      ids = instruction_ids.hash_instruction(text)
    else:
      ids = self._observation['instruction']
    self._observation = {'frame': given[_FRAME], 'instruction': ids}

  def _check_open(self) -> None:
    if self._lab is None:
      raise RuntimeError(f'level {self.level!r}: this environment was closed')

  def _words(self, error: Exception) -> str:
    return f'level {self.level!r}, episode seed {self.episode_seed}: {error}'
