"""Many environments as one `base.VectorEnvironment`, in this process."""

import inspect
import time
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


class ConcatVector:
  """Several vectors of one spec as one: the ids of each follow those before it.

  Args:
    vectors: the parts; closed with this one.
    max_ready: `recv` joins results of parts up to so many environments (one part
      alone may return more); 0 for all.

  Raises:
    ValueError: the parts differ in their specs, or there is none.
  """

  def __init__(self, vectors: Sequence[base.VectorEnvironment], max_ready: int = 0):
    if not vectors:
      raise ValueError('vectors is empty: at least one is needed')
    self._parts = list(vectors)
    self.spec = specs.common_spec([v.spec for v in vectors])
    self.task_ids = np.concatenate([v.task_ids for v in vectors])
    sizes = np.array([v.num_envs for v in vectors])
    self.num_envs = int(sizes.sum())
    self._offset = np.cumsum(sizes) - sizes
    self._part_of = np.repeat(np.arange(len(sizes)), sizes)
    self._limit = max_ready or self.num_envs
    self._in_flight = np.zeros(len(sizes), np.int64)
    self._turn = 0  # The part that `recv` asks first.

  def reset(self, seed: int) -> None:
    seeds = np.random.SeedSequence(seed).generate_state(len(self._parts)) % 2**31
    for part, part_seed in zip(self._parts, seeds, strict=True):
      part.reset(int(part_seed))
    self._in_flight[:] = [v.num_envs for v in self._parts]

  def send(self, env_ids: np.ndarray, actions: np.ndarray) -> None:
    env_ids, actions = np.asarray(env_ids), np.asarray(actions)
    if env_ids.size and not 0 <= env_ids.min() <= env_ids.max() < self.num_envs:
      raise ValueError(
        f'env_ids are {env_ids.tolist()}: must lie in [0, {self.num_envs})'
      )
    parts = self._part_of[env_ids]
    for p in np.unique(parts):
      mine = parts == p
      self._parts[p].send(env_ids[mine] - self._offset[p], actions[mine])
      self._in_flight[p] += np.count_nonzero(mine)

  def recv(self, timeout: float) -> base.Ready:
    """Waits for the parts in turn, so that none is left out.

    Raises:
      TimeoutError: no part had a result.
    """
    deadline = time.monotonic() + timeout
    found: list[base.Ready] = []
    count = 0
    for k in range(len(self._parts)):
      p = (self._turn + k) % len(self._parts)
      if not self._in_flight[p]:
        continue
      if found and count + self._in_flight[p] > self._limit:
        self._turn = p
        break
      try:
        ready = self._parts[p].recv(max(0.0, deadline - time.monotonic()))
      except TimeoutError:
        continue
      self._in_flight[p] -= len(ready.env_ids)
      count += len(ready.env_ids)
      found.append(_shifted(ready, int(self._offset[p])))
    if not found:
      raise TimeoutError(
        f'none of {self.num_envs} environments became ready, '
        f'{int(self._in_flight.sum())} have actions'
      )
    return found[0] if len(found) == 1 else _join(found)

  def close(self) -> None:
    for part in self._parts:
      part.close()


def _shifted(ready: base.Ready, offset: int) -> base.Ready:
  return base.Ready(
    env_ids=(ready.env_ids + offset).astype(np.int32),
    timestep=ready.timestep,
    episodes=[e._replace(env_id=e.env_id + offset) for e in ready.episodes],
    restarted=[i + offset for i in ready.restarted],
    failures=[f._replace(env_id=f.env_id + offset) for f in ready.failures],
  )


def _join(found: Sequence[base.Ready]) -> base.Ready:
  steps = [r.timestep for r in found]
  observations = [s.observation for s in steps]
  joined: Any
  if isinstance(observations[0], dict):
    joined = {k: np.concatenate([o[k] for o in observations]) for k in observations[0]}
  else:
    joined = np.concatenate(observations)
  return base.Ready(
    env_ids=np.concatenate([r.env_ids for r in found]),
    timestep=types.TimeStep(
      step_type=np.concatenate([s.step_type for s in steps]),
      reward=np.concatenate([s.reward for s in steps]),
      discount=np.concatenate([s.discount for s in steps]),
      observation=joined,
    ),
    episodes=[e for r in found for e in r.episodes],
    restarted=[i for r in found for i in r.restarted],
    failures=[f for r in found for f in r.failures],
  )
