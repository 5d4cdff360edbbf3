"""Many `dm_env` environments as one `base.VectorEnvironment`, in this process."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import dm_env
import numpy as np

from impala_jax import types
from impala_jax.environments import base, specs


class SequentialVector:
  """`dm_env` environments stepped in turn inside `recv`.

  Right for cheap environments: each waits for the others, and one that blocks or
  dies takes the process with it.

  Args:
    factories: each makes one environment. A factory with a parameter named `seed`
      is called with `seed=` an int in [0, 2^31): here, and anew in each `reset`, so
      that `reset(seed)` decides everything. An environment from any other factory
      is made once and only reset.
    task_ids: [num_envs], default all 0.
    max_ready: the most environments that one `recv` returns, 0 for no limit.

  Raises:
    ValueError: see `specs.environment_spec`; or the environments differ in their specs.
  """

  def __init__(
    self,
    factories: Sequence[Callable[..., dm_env.Environment]],
    task_ids: Sequence[int] | np.ndarray | None = None,
    max_ready: int = 0,
  ):
    self.num_envs = len(factories)
    if not factories:
      raise ValueError('factories is empty: at least one environment is needed')
    self.task_ids = np.asarray(
      np.zeros(self.num_envs) if task_ids is None else task_ids, np.int32
    )
    if self.task_ids.shape != (self.num_envs,):
      raise ValueError(
        f'task_ids has shape {list(self.task_ids.shape)}: must be [{self.num_envs}]'
      )
    self._factories = list(factories)
    self._takes_seed = ['seed' in inspect.signature(f).parameters for f in factories]
    self._limit = max_ready or self.num_envs
    self._environments = [
      f(seed=0) if seeded else f()
      for f, seeded in zip(factories, self._takes_seed, strict=True)
    ]
    self.spec = specs.common_spec(
      [specs.environment_spec(e) for e in self._environments]
    )
    self._return = np.zeros(self.num_envs, np.float64)
    self._length = np.zeros(self.num_envs, np.int64)
    self._pending: list[tuple[int, int | None]] = []  # Environment, action or reset.
    self._waiting = [False] * self.num_envs
    self._closed = False

  def reset(self, seed: int) -> None:
    """Begins the first episodes."""
    self._check_open()
    seeds = np.random.SeedSequence(seed).generate_state(self.num_envs) % 2**31
    for i, factory in enumerate(self._factories):
      if self._takes_seed[i]:
        self._environments[i].close()
        self._environments[i] = factory(seed=int(seeds[i]))
    self._pending = [(i, None) for i in range(self.num_envs)]
    self._waiting = [False] * self.num_envs

  def send(self, env_ids: np.ndarray, actions: np.ndarray) -> None:
    """Takes int32 `actions` [K]; they are carried out by `recv`.

    Raises:
      ValueError: an action is out of range, or an environment waits for none.
    """
    self._check_open()
    ids, values = base.checked_actions(
      env_ids, actions, self.spec.num_actions, self._waiting
    )
    for i in ids:
      self._waiting[i] = False
    self._pending.extend(zip(ids, values, strict=True))

  def recv(self, timeout: float) -> base.Ready:
    """Steps the environments that have actions, in the order of these.

    Raises:
      TimeoutError: no environment has an action (at once: waiting would not help).
      ValueError: an environment broke its own spec.
    """
    self._check_open()
    if not self._pending:
      raise TimeoutError(f'all of the {self.num_envs} environments wait for actions')
    batch, self._pending = self._pending[: self._limit], self._pending[self._limit :]
    count = len(batch)
    timestep = types.TimeStep(
      step_type=np.empty(count, np.uint8),
      reward=np.zeros(count, np.float32),
      discount=np.ones(count, np.float32),
      observation=_map(lambda s: np.empty((count, *s.shape), s.dtype), self.spec),
    )
    episodes: list[base.EpisodeEnd] = []
    for row, (i, action) in enumerate(batch):
      environment = self._environments[i]
      step = environment.reset() if action is None else environment.step(action)
      self._write(timestep, row, step)
      self._count(i, step, episodes)
      self._waiting[i] = True
    return base.Ready(np.array([i for i, _ in batch], np.int32), timestep, episodes)

  def frame(self) -> np.ndarray | None:
    """A picture of environment 0, uint8 [H, W, 3], by its own method `frame`.

    None where it has no such method or no picture.
    """
    make = getattr(self._environments[0], 'frame', None)
    return None if make is None else make()

  def close(self) -> None:
    """Closes every environment. Idempotent."""
    if not self._closed:
      self._closed = True
      for environment in self._environments:
        environment.close()

  def _write(self, timestep: types.TimeStep, row: int, step: dm_env.TimeStep) -> None:
    timestep.step_type[row] = int(step.step_type)
    if not step.first():
      for name in ('reward', 'discount'):
        value = getattr(step, name)
        if np.ndim(value) or value is None:
          raise ValueError(f'{name} is {value!r}: must be one number')
        getattr(timestep, name)[row] = value
    wanted, given = self.spec.observation, step.observation
    if isinstance(wanted, dict):
      for k in wanted:
        _copy(timestep.observation[k], row, given[k], k)
    else:
      _copy(timestep.observation, row, given, 'observation')

  def _count(
    self, i: int, step: dm_env.TimeStep, episodes: list[base.EpisodeEnd]
  ) -> None:
    if step.first():
      self._return[i] = self._length[i] = 0
      return
    self._return[i] += step.reward
    self._length[i] += 1
    if step.last():
      end = base.EpisodeEnd(
        task_id=int(self.task_ids[i]),
        episode_return=float(self._return[i]),
        length=int(self._length[i]),
        truncated=bool(step.discount != 0),
        env_id=i,
      )
      episodes.append(end)

  def _check_open(self) -> None:
    if self._closed:
      raise RuntimeError('this SequentialVector was closed')


def _map(f: Callable[[types.ArraySpec], Any], spec: types.EnvironmentSpec) -> Any:
  if isinstance(spec.observation, dict):
    return {k: f(s) for k, s in spec.observation.items()}
  return f(spec.observation)


def _copy(out: np.ndarray, row: int, value: Any, name: str) -> None:
  value = np.asarray(value)
  if value.shape != out.shape[1:]:
    raise ValueError(
      f'observation {name!r} has shape {list(value.shape)}: its spec says '
      f'{list(out.shape[1:])}'
    )
  out[row] = value
