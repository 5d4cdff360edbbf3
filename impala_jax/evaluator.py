"""Plays whole games with given parameters and measures their returns."""

import json
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from impala_jax import checkpointing, components, plotting, types
from impala_jax.agents import agent as agent_lib
from impala_jax.environments import base

_VIDEO_STEPS = 2_700  # Three minutes of play at 15 agent steps a second.


def play(
  agent: agent_lib.Agent,
  params: types.Nest,
  environment: base.VectorEnvironment,
  *,
  seed: int,
  greedy: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
  on_step: Callable[[], None] = lambda: None,
  max_steps: int | None = None,
) -> list[base.EpisodeEnd]:
  """The first episode of each environment.

  One episode an environment: taking whichever ends first would favour short ones.

  Args:
    agent: the policy.
    params: of the policy.
    environment: closed by the caller.
    seed: of environments and sampling.
    greedy: take the likeliest action instead of sampling one.
    should_stop: ends the play early.
    on_step: called after each policy call.
    max_steps: policy calls after which the play ends.

  Returns:
    The episodes that ended; fewer than environments only where stopped early.
  """
  count = environment.num_envs
  state = agent.initial_state(count)
  key = jax.random.key(seed)
  last_action = np.zeros(count, np.int32)
  waiting = np.ones(count, bool)  # Whose first episode goes on.
  episodes: list[base.EpisodeEnd] = []
  step = _policy(agent, greedy)
  environment.reset(seed)
  steps = 0
  while (
    waiting.any() and not should_stop() and (max_steps is None or steps < max_steps)
  ):
    ready = environment.recv(timeout=60.0)
    ids = ready.env_ids
    # Every environment answers every step here, so ids is a permutation.
    order = np.argsort(ids)
    timestep = jax.tree.map(lambda x, order=order: x[order], ready.timestep)
    for episode in ready.episodes:
      if waiting[episode.env_id]:
        waiting[episode.env_id] = False
        episodes.append(episode)
    key, sub = jax.random.split(key)
    action, state = step(params, sub, timestep, last_action, state)
    last_action = np.asarray(action)
    environment.send(np.arange(count, dtype=np.int32), last_action)
    steps += 1
    on_step()
  return episodes


class VideoWriter:
  """Writes frames as MP4, magnified to be looked at; aside, then renamed.

  Args:
    path: of the file.
    fps: frames a second.
  """

  def __init__(self, path: pathlib.Path, fps: float):
    self._path = path
    self._aside = path.with_name(f'.aside-{path.name}')
    self._fps = fps
    self._writer: Any = None

  def add(self, frame: np.ndarray | None) -> None:
    """Appends uint8 [H, W, 3]; None is left out."""
    if frame is None:
      return
    if self._writer is None:
      import imageio_ffmpeg

      height, width = frame.shape[:2]
      factor = max(1, round(480 / height))
      self._writer = imageio_ffmpeg.write_frames(
        str(self._aside), (width, height), fps=self._fps, macro_block_size=1,
        output_params=[
          '-vf', f'scale={2 * (factor * width // 2)}:{2 * (factor * height // 2)}'
          ':flags=neighbor',
        ],
        ffmpeg_log_level='error',
      )  # fmt: skip
      self._writer.send(None)
    self._writer.send(np.ascontiguousarray(frame))

  def close(self) -> bool:
    """Finishes the file; False where there was no frame."""
    if self._writer is None:
      return False
    self._writer.close()
    self._aside.replace(self._path)
    return True


def _policy(agent: agent_lib.Agent, greedy: bool) -> Any:
  choose = agent.greedy_step if greedy else agent.step

  @jax.jit
  def step(
    params: types.Nest,
    key: jax.Array,
    timestep: types.TimeStep,
    last_action: jax.Array,
    state: types.Nest,
  ) -> Any:
    out = choose(params, key, timestep, last_action, state)
    return out.action, out.state

  return step


class Session:
  """Evaluations of one run, kept in its directory.

  Args:
    parts: of the run.
    run_dir: gets `evaluations.jsonl`, `evaluation_<level>.mp4` and
      `learning_curve.png`.
  """

  def __init__(self, parts: components.Components, run_dir: pathlib.Path):
    self._parts = parts
    self._config = parts.config
    self._run_dir = run_dir

  def evaluate(
    self, version: int, params: types.Nest, should_stop: Callable[[], bool]
  ) -> dict[str, Any] | None:
    """Plays all levels; an `evaluation` event, or None if stopped before the end."""
    config = self._config.evaluator
    returns: dict[str, list[float]] = {}
    for task_id, level in enumerate(self._config.environment.levels):
      environment = self._parts.make_evaluation(level, config.episodes)
      try:
        episodes = play(
            self._parts.agent, params, environment,
            seed=self._config.seed + 104_729 * (version + 1) + task_id,
            greedy=config.greedy, should_stop=should_stop,
        )  # fmt: skip
      finally:
        environment.close()
      if len(episodes) < config.episodes:
        return None
      returns[level] = [e.episode_return for e in episodes]
    means = {level: float(np.mean(r)) for level, r in returns.items()}
    event = {
      'kind': 'evaluation',
      'time': time.time(),
      'version': int(version),
      'frames': int(version) * self._config.frames_per_update,
      'mean': float(np.mean(list(means.values()))),
      'means': means,
      'returns': returns,
    }
    with open(self._run_dir / 'evaluations.jsonl', 'a') as f:
      f.write(json.dumps(event) + '\n')
    return event

  def finish(self, should_stop: Callable[[], bool]) -> None:
    """Evaluates the newest checkpoint and writes videos and the learning curve."""
    found = checkpointing.paths(self._run_dir / 'checkpoints')
    if found:
      data = checkpointing.read(found[-1])
      params = data['state']['params']
      logging.info('last evaluation of %s', found[-1])
      self.evaluate(data['metadata']['updates'], params, should_stop)
      if self._config.evaluator.video:
        for level in self._config.environment.levels:
          if not should_stop():
            self.video(level, params, should_stop)
    plotting.learning_curve(self._run_dir)

  def video(
    self, level: str, params: types.Nest, should_stop: Callable[[], bool]
  ) -> pathlib.Path | None:
    """Films one episode; None where the suite has no pictures for people."""
    scene = self._parts.make_scene(level)
    if scene is None:
      return None
    path = self._run_dir / f'evaluation_{level}.mp4'
    video = VideoWriter(path, 60.0 / self._config.environment.action_repeat)
    try:
      play(
        self._parts.agent, params, scene, seed=self._config.seed + 31,
        greedy=self._config.evaluator.greedy, should_stop=should_stop,
        on_step=lambda: video.add(scene.frame()), max_steps=_VIDEO_STEPS,
      )  # fmt: skip
    finally:
      scene.close()
      written = video.close()
    if not written:
      return None
    logging.info('wrote %s', path)
    return path
