"""Compiles maps ahead of a run, over a pool of `map_compiler` engines."""

import collections
import contextlib
import dataclasses
from collections.abc import Callable

import numpy as np

from impala_jax import config as config_lib
from impala_jax.environments.dmlab import (
  level_cache,
  map_compiler,
)
from impala_jax.environments.dmlab import suite as dmlab_suite
from impala_jax.environments.engines import pool as process_pool

# A level that did not ask for a map so many times has none to compile, and one that
# failed so many times and never succeeded will not succeed.
_ENOUGH = 3


@dataclasses.dataclass
class LevelReport:
  """What became of one level."""

  episodes: int = 0  # Begun.
  skipped: int = 0  # Left out: see `_ENOUGH`.
  stats: level_cache.Stats = dataclasses.field(default_factory=level_cache.Stats)
  seconds: float = 0.0  # Of engines, not of a clock on the wall.
  failures: list[str] = dataclasses.field(default_factory=list)

  @property
  def asked(self) -> int:
    """Maps that were asked for."""
    return self.stats.hits + self.stats.misses

  @property
  def done(self) -> int:
    """Episodes that need no more work."""
    return self.episodes + len(self.failures) + self.skipped


Reports = dict[str, LevelReport]


def fill(
  config: config_lib.Config,
  *,
  seeds: int,
  processes: int,
  on_job: Callable[[Reports], None] = lambda reports: None,
) -> Reports:
  """Begins the episodes of all levels of `config` with seeds 0 to `seeds` - 1.

  Args:
    config: as resolved; `dmlab.level_cache_gib` above 0.
    seeds: episodes per level.
    processes: engines at a time; each may take `dmlab.reset_timeout` seconds.
    on_job: called as jobs end, with the reports so far.

  Raises:
    base.EngineError: no engine process can be had.
    config.ConfigError: a level is held out for evaluation.
  """
  settings = config.of_suite(dmlab_suite.Settings)
  levels = [dmlab_suite.played(x, evaluation=False) for x in config.environment.levels]
  jobs = [map_compiler.Job(x, s) for x in levels for s in range(seeds)]
  reports = {x: LevelReport() for x in levels}
  count = min(processes, len(jobs))
  kwargs = {
    'jobs': [tuple(job) for job in jobs],
    'settings': dmlab_suite.engine_settings(config, evaluation=False),
  }
  maker = 'impala_jax.environments.dmlab.map_compiler:make'
  pool = process_pool.ProcessPool(
    [process_pool.EngineSpec(maker, kwargs, 'map compiler')] * count,
    [0] * count,
    map_compiler.spec(len(jobs)),
    step_timeout=settings.reset_timeout,
    reset_timeout=settings.reset_timeout,
    # One for each job would be enough: jobs that fail are not repeated.
    max_restarts=len(jobs) + count,
  )
  with contextlib.closing(pool):
    pool.reset(0)
    _run(pool, jobs, reports, on_job)
  return reports


def _run(
  pool: process_pool.ProcessPool,
  jobs: list[map_compiler.Job],
  reports: Reports,
  on_job: Callable[[Reports], None],
) -> None:
  pending = collections.deque(range(len(jobs)))
  running: dict[int, int] = {}  # Environment -> job.
  while pending or running:
    try:
      ready = pool.recv(timeout=1.0)
    except TimeoutError:
      on_job(reports)
      continue
    for failure in ready.failures:
      job = running.pop(failure.env_id, None)
      if job is not None:
        report = reports[jobs[job].level]
        seed = jobs[job].episode_seed
        report.failures.append(f'{jobs[job].level}, seed {seed}: {failure.cause}')
    sent: list[int] = []
    for row, env_id in enumerate(ready.env_ids.tolist()):
      job = running.pop(env_id, None)
      if job is not None and env_id not in ready.restarted:
        done = map_compiler.result(
          ready.timestep.reward[row], ready.timestep.observation[row]
        )
        report = reports[jobs[job].level]
        report.episodes += 1
        report.seconds += done.seconds
        report.stats.add(done.stats)
      following = _next(pending, jobs, reports)
      if following is not None:
        running[env_id] = following
        sent.append(env_id)
    pool.send(np.array(sent, np.int32), np.array([running[i] for i in sent], np.int32))
    on_job(reports)


def _next(
  pending: collections.deque[int], jobs: list[map_compiler.Job], reports: Reports
) -> int | None:
  while pending:
    job = pending.popleft()
    report = reports[jobs[job].level]
    no_maps = report.episodes >= _ENOUGH and not report.asked
    hopeless = len(report.failures) >= _ENOUGH and not report.episodes
    if not no_maps and not hopeless:
      return job
    report.skipped += 1
  return None
