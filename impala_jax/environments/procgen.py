"""The 16 games of Procgen: 64x64 colours, 15 actions, levels without end.

A level is a game, `coinrun` (the hard distribution) or `coinrun_easy`. The engine
begins the next episode in the step that ends one and keeps the last frame for itself:
the LAST step therefore repeats the frame before it. It does not say whether its limit
of 1,000 steps ended an episode, so that the discount there is always 0, as is usual.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from impala_jax import config as config_lib
from impala_jax import types
from impala_jax.environments import base, concat_vector, level_names, registry

GAMES = (
  'bigfish',
  'bossfight',
  'caveflyer',
  'chaser',
  'climber',
  'coinrun',
  'dodgeball',
  'fruitbot',
  'heist',
  'jumper',
  'leaper',
  'maze',
  'miner',
  'ninja',
  'plunder',
  'starpilot',
)
_EASY = '_easy'
_NOOP = 4
SPEC = types.EnvironmentSpec(types.ArraySpec((64, 64, 3), np.dtype(np.uint8)), 15)
NOT_INSTALLED = (
  'environment.suite is procgen, but the module procgen is not installed. It needs '
  'numpy < 2 (the set `cluster`): pip install --no-deps procgen-mirror gym3 gym '
  'gym-notices cloudpickle imageio glfw moderngl glcontext'
)


class ProcgenVector:
  """`num_envs` environments of one level; a `base.VectorEnvironment`.

  Each `recv` returns all of them. An action that is ignored, after a LAST step, costs
  the engine's episode one step without movement.

  Args:
    level: see above.
    num_envs: how many.
    task_id: goes into `task_ids`.
    threads: native threads; 0: the calling one.
  """

  def __init__(self, level: str, num_envs: int, *, task_id: int = 0, threads: int = 0):
    self.num_envs = num_envs
    self.spec = SPEC
    self.task_ids = np.full(num_envs, task_id, np.int32)
    self._level = level
    self._threads = threads
    self._engine: Any = None
    self._frames = np.zeros((num_envs, *SPEC.observation.shape), np.uint8)
    self._begins = np.ones(num_envs, np.bool_)  # The next time step is FIRST.
    self._waiting = np.zeros(num_envs, np.bool_)
    self._actions = np.full(num_envs, _NOOP, np.int32)
    self._return = np.zeros(num_envs, np.float64)
    self._length = np.zeros(num_envs, np.int64)
    self._fresh = True  # The engine has not stepped since `reset`.

  def reset(self, seed: int) -> None:
    """Begins the first episodes. The same seed and actions give the same episodes."""
    self.close()
    game = self._level.removesuffix(_EASY)
    from procgen import env  # Its import takes a second.

    self._engine = env.ProcgenGym3Env(
      num=self.num_envs,
      env_name=game,
      rand_seed=seed,
      num_threads=self._threads,
      distribution_mode='hard' if game == self._level else 'easy',
    )
    self._begins[:] = True
    self._waiting[:] = False
    self._return[:] = 0
    self._length[:] = 0
    self._fresh = True

  def send(self, env_ids: np.ndarray, actions: np.ndarray) -> None:
    """Takes `actions` [K] in environments `env_ids` [K].

    Raises:
      ValueError: an action is out of range, or an environment waits for none.
    """
    ids, values = base.checked_actions(
      env_ids, actions, SPEC.num_actions, self._waiting.tolist()
    )
    self._actions[ids] = values
    self._waiting[ids] = False

  def recv(self, timeout: float) -> base.Ready:
    """Steps the engine, which takes microseconds: `timeout` is not needed.

    Raises:
      TimeoutError: environments wait for actions.
    """
    if self._waiting.any():
      raise TimeoutError(
        f'environments {np.flatnonzero(self._waiting).tolist()} wait for actions'
      )
    first = self._begins
    if not self._fresh:
      self._engine.act(np.where(first, _NOOP, self._actions).astype(np.int32))
    reward, observation, begins = self._engine.observe()
    # An episode of one step, the ignored one, is as if it had not been.
    ended = begins & ~first
    new = np.array(observation['rgb'])  # The engine writes to its own again.
    frames = np.where(ended[:, None, None, None], self._frames, new)
    self._frames = new

    gone = first & begins & (not self._fresh)
    self._return += np.where(gone | self._fresh, 0, reward)
    self._length += ~first
    step_type = np.full(self.num_envs, types.StepType.MID, np.uint8)
    step_type[first] = types.StepType.FIRST
    step_type[ended] = types.StepType.LAST
    timestep = types.TimeStep(
      step_type,
      np.where(first, 0, reward).astype(np.float32),
      np.where(ended, 0, 1).astype(np.float32),
      frames,
    )
    episodes = [self._finish(int(i)) for i in np.flatnonzero(ended)]
    self._begins = ended
    self._waiting[:] = True
    self._fresh = False
    return base.Ready(np.arange(self.num_envs, dtype=np.int32), timestep, episodes)

  def close(self) -> None:
    """Ends the engine. Idempotent."""
    if self._engine is not None:
      self._engine.close()
      self._engine = None

  def _finish(self, env_id: int) -> base.EpisodeEnd:
    end = base.EpisodeEnd(
      int(self.task_ids[env_id]),
      float(self._return[env_id]),
      int(self._length[env_id]),
      truncated=False,
      env_id=env_id,
    )
    self._return[env_id] = 0
    self._length[env_id] = 0
    return end


def problem(level: str) -> str | None:
  """Why there is no such level, or None where there is one."""
  if level.removesuffix(_EASY) in GAMES:
    return None
  near = level_names.near(level, [*GAMES, *(f'{game}{_EASY}' for game in GAMES)])
  hint = f'did you mean {", ".join(near)}? It ' if near else ''
  return (
    f'unknown level {level!r} of Procgen: {hint}must be one of {", ".join(GAMES)}, '
    f'each also with {_EASY}'
  )


def _missing() -> str:
  return NOT_INSTALLED if importlib.util.find_spec('procgen') is None else ''


def _vector(
  config: config_lib.Config, tasks: Sequence[int], evaluation: bool
) -> base.VectorEnvironment:
  threads = config.actor.env_threads if config.actor.env_threads > 1 else 0
  return concat_vector.by_task(
    tasks,
    lambda task, count: ProcgenVector(
      config.environment.levels[task], count, task_id=task, threads=threads
    ),
    max_ready=0 if evaluation else config.actor.inference_batch,
  )


SUITE = registry.Suite(
  make=_vector,
  spec=lambda _: SPEC,
  problem=problem,
  tells_time_limits=False,
  missing=_missing,
  levels=lambda: [*GAMES, *(f'{game}{_EASY}' for game in GAMES)],
)
