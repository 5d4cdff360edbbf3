"""Evaluations of a run: whole games with given parameters, and what is kept of them."""

import json
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from impala_jax import components, types
from impala_jax.agents import agent as agent_lib
from impala_jax.distributed.control import protocol, wire
from impala_jax.environments import base
from impala_jax.evaluation import films, playing
from impala_jax.learning import checkpointing
from impala_jax.reporting import episodes, plots, sinks
from impala_jax.runtime import checkpoint_files, files
from impala_jax.runtime.run_directory import RunDirectory


class SavedPolicy(NamedTuple):
  """Parameters out of a checkpoint."""

  params: types.Nest  # NumPy leaves.
  metadata: dict[str, Any]  # Of the checkpoint: `updates`, `frames`, `config`, ...
  path: pathlib.Path


def read_policy(path: pathlib.Path) -> SavedPolicy:
  """The parameters in one file.

  Raises:
    checkpointing.CheckpointError: it is not a sound checkpoint; says why.
  """
  data = checkpointing.read(path)
  return SavedPolicy(data['state']['params'], data['metadata'], path)


def newest_policy(directory: pathlib.Path) -> SavedPolicy | None:
  """That of the newest sound checkpoint; damaged ones are skipped with a warning."""
  for path in reversed(checkpointing.paths(directory)):
    try:
      return read_policy(path)
    except checkpointing.CheckpointError as e:
      logging.warning('skipped: %s', e)
  return None


def check_policy(agent: agent_lib.Agent, policy: SavedPolicy) -> None:
  """Raises CheckpointError where the parameters are not those of `agent`'s network."""
  describe = lambda tree: {
    jax.tree_util.keystr(name): (tuple(x.shape), str(x.dtype))
    for name, x in jax.tree_util.tree_leaves_with_path(tree)
  }
  want = describe(jax.eval_shape(agent.init, jax.random.key(0)))
  found = describe(policy.params)
  differing = sorted(k for k in want.keys() | found if want.get(k) != found.get(k))
  if differing:
    name = differing[0]
    raise checkpointing.CheckpointError(
      f'{policy.path} is of another network: {name} is '
      f'{found.get(name, "missing")}, this configuration needs '
      f'{want.get(name, "none")}'
    )


class Session:
  """Evaluations of one run, kept in its directory.

  Args:
    parts: of the run.
    run_dir: gets `evaluations.jsonl`, `evaluation_<level>.mp4` and
      `learning_curve.png`.
    check: called before an evaluation is noted; raises where this process must not
      write any more.
  """

  def __init__(
    self,
    parts: components.Components,
    run_dir: pathlib.Path,
    check: Callable[[], None] = lambda: None,
  ):
    self._check = check
    self._parts = parts
    self._config = parts.config
    self._run_dir = run_dir
    self._frames_ahead: int | None = None

  def evaluate(
    self, version: int, params: types.Nest, should_stop: Callable[[], bool]
  ) -> protocol.Evaluation | None:
    """Plays all levels.

    None if stopped before the end, or if no level could be played.
    """
    frames = self._frames(version)
    config, levels = self._config.evaluator, self._config.environment.levels
    results = playing.play_levels(
      self._parts,
      params,
      range(len(levels)),
      config.episodes,
      processes=config.processes,
      seed=self._config.seed + 104_729 * (version + 1),
      greedy=config.greedy,
      should_stop=should_stop,
    )
    failed = {levels[r.task_id]: r.error for r in results if r.error}
    played = [r for r in results if r.complete]
    if len(played) + len(failed) < len(results) or not played:
      return None
    returns = {levels[r.task_id]: r.returns for r in played}
    means = {level: float(np.mean(r)) for level, r in returns.items()}
    event = protocol.Evaluation(
      time=time.time(),
      version=int(version),
      frames=frames,
      mean=float(np.mean(list(means.values()))),
      means=means,
      scores=episodes.suite_scores(self._config, means),
      returns=returns,
      failed=failed,
    )
    run = RunDirectory(self._run_dir)
    self._check()
    # The learner may have gone back to a checkpoint since the last one.
    sinks.cut_evaluations(run, event.version)
    with files.naming(run.evaluations), open(run.evaluations, 'a') as f:
      f.write(json.dumps(wire.plain(event)) + '\n')
    return event

  def _frames(self, version: int) -> int:
    """That were trained on in so many updates."""
    per_update = self._config.frames_per_update
    if self._frames_ahead is None:
      # Any checkpoint of this start, or that it went on from, says the same.
      found = checkpoint_files.newest(RunDirectory(self._run_dir).checkpoints)
      self._frames_ahead = checkpoint_files.frames_ahead(
        found.metadata if found else {}, per_update
      )
    return int(version) * per_update + self._frames_ahead

  def finish(self, should_stop: Callable[[], bool]) -> None:
    """Evaluates the newest checkpoint and writes videos and the learning curve.

    What draws and films are extras: without them there are no pictures.
    """
    policy = newest_policy(RunDirectory(self._run_dir).checkpoints)
    if policy is not None:
      logging.info('last evaluation of %s', policy.path)
      self.evaluate(policy.metadata['updates'], policy.params, should_stop)
      if self._config.evaluator.video:
        for level in self._config.environment.levels:
          if not should_stop():
            self.video(level, policy.params, should_stop)
    try:
      plots.learning_curve(self._run_dir)
      plots.level_curves(self._run_dir)
    except ImportError as e:
      logging.warning('no learning curve: %s', e)

  def video(
    self, level: str, params: types.Nest, should_stop: Callable[[], bool]
  ) -> pathlib.Path | None:
    """Films one episode; None where there are no pictures, or the engine fails."""
    try:
      path = films.film(
        self._parts,
        params,
        level,
        self._run_dir,
        seed=self._config.seed + 31,
        greedy=self._config.evaluator.greedy,
        should_stop=should_stop,
      )
    except (base.EngineError, TimeoutError, ImportError) as e:
      logging.warning('%s could not be filmed: %s', level, e)
      return None
    if path is not None:
      logging.info('wrote %s', path)
    return path
