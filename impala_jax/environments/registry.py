"""From a configuration to environments.

A suite is a family of levels. Known are `atari`, `catch`, whatever was registered in
this process, and `some_package.some_module:attribute`, which every process of a run
can import by itself; the attribute is what `register` takes.
"""

import difflib
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import dm_env
import numpy as np

from impala_jax import config as config_lib
from impala_jax import types
from impala_jax.environments import (
  atari,
  atari_games,
  atari_video,
  base,
  catch,
  specs,
  vector,
)


class Scene(base.VectorEnvironment, Protocol):
  """One environment that plays whole games, with its picture."""

  def frame(self) -> np.ndarray | None:
    """The picture of the last time step, uint8 [H, W, 3]; None without one."""


class Suite(NamedTuple):
  """A family of levels that brings its own vector environment."""

  # Configuration, task of each environment (an index into `environment.levels`),
  # whether to play whole games as for evaluation.
  make: Callable[[config_lib.Config, Sequence[int], bool], base.VectorEnvironment]
  spec: Callable[[config_lib.Config], types.EnvironmentSpec]
  # What is wrong with a level, or None. Levels are not checked where this is None.
  problem: Callable[[str], str | None] | None = None
  # One environment of a task that plays whole games and is filmed, or None.
  scene: Callable[[config_lib.Config, int], Scene | None] | None = None


# Makes one environment: `make(level, seed=...)`.
EnvironmentMaker = Callable[..., dm_env.Environment]


def register(
  name: str,
  suite: Suite | EnvironmentMaker,
  levels: Sequence[str] | None = None,
) -> None:
  """Makes `environment.suite = name` known in this process.

  Args:
    name: the name; registering it again replaces it.
    suite: a `Suite`, or a function `make(level, seed=...)` that returns a
      `dm_env.Environment`. All levels must agree in their specs.
    levels: the levels that exist, None to take any name (not with a `Suite`).
  """
  _suites[name] = _as_suite(suite, levels)


def suites() -> tuple[str, ...]:
  """Names of the suites known in this process."""
  return tuple(sorted(_suites))


def make_vector(
  config: config_lib.Config,
  actor_id: int = 0,
  *,
  evaluation: bool = False,
  num_envs: int | None = None,
  level: str | None = None,
) -> base.VectorEnvironment:
  """The environments of one actor, or of an evaluator.

  Levels are dealt round robin over all environments of all actors: environment j
  of actor i plays level (i * envs_per_actor + j) % len(levels).

  Args:
    config: the run.
    actor_id: i.
    evaluation: play whole games: no episode ends at a lost life. Each `recv`
      returns all environments.
    num_envs: default `actor.envs_per_actor`.
    level: all environments play this one, which must be among the configured.

  Raises:
    config.ConfigError: the suite or a level is unknown.
  """
  check_levels(config)
  count = config.actor.envs_per_actor if num_envs is None else num_envs
  levels = config.environment.levels
  if level is not None:
    tasks = [_task(config, level)] * count
  else:
    start = actor_id * config.actor.envs_per_actor
    tasks = [(start + j) % len(levels) for j in range(count)]
  return _suite(config.environment.suite).make(config, tasks, evaluation)


def make_scene(config: config_lib.Config, level: str) -> Scene | None:
  """One environment that plays whole games and is filmed; None where none can be.

  Raises:
    config.ConfigError: the suite or the level is unknown.
  """
  check_levels(config)
  task = _task(config, level)
  scene = _suite(config.environment.suite).scene
  return None if scene is None else scene(config, task)


def environment_spec(config: config_lib.Config) -> types.EnvironmentSpec:
  """What the network must know, without making an actor's environments.

  Raises:
    config.ConfigError: the suite or a level is unknown.
  """
  check_levels(config)
  return _suite(config.environment.suite).spec(config)


def check_levels(config: config_lib.Config) -> None:
  """Raises ConfigError that lists every level that does not exist."""
  problem = _suite(config.environment.suite).problem
  found = [problem(x) for x in config.environment.levels] if problem else []
  if any(found):
    raise config_lib.ConfigError('\n'.join(x for x in found if x))


def random_seed(seed: int, actor_id: int, incarnation: int = 0) -> int:
  """In [0, 2^31): differs between actors, and each time that one restarts."""
  draw = np.random.SeedSequence([seed, actor_id, incarnation]).generate_state(1)
  return int(draw[0]) % 2**31


def _task(config: config_lib.Config, level: str) -> int:
  levels = config.environment.levels
  if level not in levels:
    raise config_lib.ConfigError(
      f'level is {level!r}: must be one of environment.levels, {", ".join(levels)}'
    )
  return levels.index(level)


def _suite(name: str) -> Suite:
  if name in _suites:
    return _suites[name]
  module, colon, attribute = name.partition(':')
  if colon:
    try:
      return _as_suite(getattr(importlib.import_module(module), attribute), None)
    except (ImportError, AttributeError) as e:
      raise config_lib.ConfigError(f'environment.suite is {name!r}: {e}') from e
  near = difflib.get_close_matches(name, _suites, 1)
  hint = f'did you mean {near[0]}?' if near else f'known are {", ".join(suites())};'
  raise config_lib.ConfigError(
    f'environment.suite is {name!r}: {hint} your own is made known by '
    'registry.register, or named as package.module:attribute'
  )


def _as_suite(suite: Suite | EnvironmentMaker, levels: Sequence[str] | None) -> Suite:
  if isinstance(suite, Suite):
    return suite
  maker = suite

  def problem(level: str) -> str | None:
    assert levels is not None
    if level in levels:
      return None
    near = difflib.get_close_matches(level, levels, 3) or levels
    return f'unknown level {level!r}: did you mean {", ".join(near)}?'

  def make(
    config: config_lib.Config, tasks: Sequence[int], evaluation: bool
  ) -> vector.SequentialVector:
    return vector.SequentialVector(
      [functools.partial(_make, maker, config.environment.levels[t]) for t in tasks],
      tasks,
      max_ready=0 if evaluation else config.actor.inference_batch,
    )

  def scene(config: config_lib.Config, task: int) -> Scene | None:
    made = make(config, [task], True)
    made.reset(0)  # Some environments have no picture before.
    made.recv(0.0)
    if made.frame() is not None:
      return made
    made.close()
    return None

  def spec(config: config_lib.Config) -> types.EnvironmentSpec:
    environment = _make(maker, config.environment.levels[0], seed=0)
    try:
      return specs.environment_spec(environment)
    finally:
      environment.close()

  return Suite(
    make=make,
    spec=spec,
    problem=None if levels is None else problem,
    scene=scene,
  )


def _make(maker: EnvironmentMaker, level: str, *, seed: int) -> dm_env.Environment:
  return maker(level, seed=seed)


def _full_actions(config: config_lib.Config) -> bool:
  settings = config.environment
  return settings.full_action_space or len(settings.levels) > 1


def _atari_settings(config: config_lib.Config) -> dict:
  return {
    'action_repeat': config.environment.action_repeat,
    'sticky_actions': config.environment.sticky_actions,
    'max_episode_frames': config.environment.max_episode_frames,
    'full_action_space': _full_actions(config),
  }


def _atari_vector(
  config: config_lib.Config, tasks: Sequence[int], evaluation: bool
) -> base.VectorEnvironment:
  batch = 0 if evaluation else config.actor.inference_batch
  parts: list[base.VectorEnvironment] = []
  distinct = sorted(set(tasks))
  for task in distinct:
    count = tasks.count(task)
    part = atari.AtariVector(
      config.environment.levels[task],
      count,
      task_id=task,
      episodic_life=config.environment.episodic_life and not evaluation,
      env_threads=max(1, config.actor.env_threads // len(distinct)),
      inference_batch=batch if batch < count else 0,
      **_atari_settings(config),
    )
    parts.append(part)
  return parts[0] if len(parts) == 1 else vector.ConcatVector(parts, batch)


_suites: dict[str, Suite] = {
  'atari': Suite(
    make=_atari_vector,
    spec=lambda c: atari.spec(c.environment.levels[0], _full_actions(c)),
    problem=atari_games.problem,
    scene=lambda c, task: atari_video.AtariVideo(
      c.environment.levels[task], task_id=task, **_atari_settings(c)
    ),
  )
}
register('catch', lambda level, seed: catch.Catch(seed=seed), ['catch'])
