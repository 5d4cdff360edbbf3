"""Fills a level cache: an engine process that compiles the maps it is told to.

The interface is that of an environment, so that `process_pool` can watch over it: an
action is the number of a job, and playing it is beginning the job's episode, at which
the engine compiles the map or has it from the cache.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import dm_env
import numpy as np
from dm_env import specs

from impala_jax import types
from impala_jax.environments.dmlab import environment as dmlab
from impala_jax.environments.dmlab import level_cache

_COUNTS = ('hits', 'misses', 'writes', 'evictions')


class Job(NamedTuple):
  """One map, or none where the level's maps come with the engine."""

  level: str
  episode_seed: int


class Result(NamedTuple):
  """Of a job."""

  seconds: float
  stats: level_cache.Stats


def make(
  seed: int, *, jobs: Sequence[tuple[str, int]], settings: dict[str, Any]
) -> dm_env.Environment:
  """A `MapCompiler`, by a name for `process_pool.EngineSpec`."""
  del seed  # Jobs have their own.
  return MapCompiler(jobs, settings)


def spec(num_jobs: int) -> types.EnvironmentSpec:
  """Of a `MapCompiler`."""
  counts = types.ArraySpec((len(_COUNTS),), np.dtype(np.int32))
  return types.EnvironmentSpec(counts, num_jobs)


def result(reward: float, observation: np.ndarray) -> Result:
  """What a time step of a `MapCompiler` says."""
  counts = dict(zip(_COUNTS, map(int, observation), strict=True))
  return Result(float(reward), level_cache.Stats(**counts))


class MapCompiler(dm_env.Environment):
  """Plays jobs in any order; an episode that never ends.

  Observation: int32 [4], hits, misses, writes and evictions of the last job.
  Reward: seconds that the job took.

  Args:
    jobs: pairs of level and episode seed.
    settings: of `dmlab.DmLab`, but for level and seed.
  """

  def __init__(self, jobs: Sequence[tuple[str, int]], settings: dict[str, Any]):
    self._jobs = [Job(*job) for job in jobs]
    self._settings = settings
    self._lab: dmlab.DmLab | None = None
    self._level = ''
    self.episode_seed = -1

  def reset(self) -> dm_env.TimeStep:
    return dm_env.restart(np.zeros(len(_COUNTS), np.int32))

  def step(self, action: int) -> dm_env.TimeStep:
    """Raises whatever the engine raises."""
    job = self._jobs[action]
    start = time.monotonic()
    lab = self._open(job.level)
    self.episode_seed = job.episode_seed
    cache = lab.level_cache
    assert cache is not None  # The caller gives a bound above 0.
    before = cache.stats()
    lab.begin(job.episode_seed)
    after = cache.stats()
    counts = [getattr(after, name) - getattr(before, name) for name in _COUNTS]
    return dm_env.transition(time.monotonic() - start, np.array(counts, np.int32))

  def observation_spec(self) -> specs.Array:
    return specs.Array((len(_COUNTS),), np.int32, 'counts')

  def action_spec(self) -> specs.DiscreteArray:
    return specs.DiscreteArray(len(self._jobs), np.int32, 'job')

  def close(self) -> None:
    if self._lab is not None:
      self._lab.close()
      self._lab = None

  def _open(self, level: str) -> dmlab.DmLab:
    """The engine of `level`; one at a time."""
    if self._lab is None or self._level != level:
      self.close()
      self._lab = dmlab.DmLab(level, 0, **self._settings)
      self._level = level
    return self._lab
