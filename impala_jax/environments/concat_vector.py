"""Several vectors of environments as one `base.VectorEnvironment`."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from impala_jax import types
from impala_jax.environments import base, specs


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


def by_task(
  tasks: Sequence[int],
  make: Callable[[int, int], base.VectorEnvironment],
  max_ready: int,
) -> base.VectorEnvironment:
  """One vector for each distinct task, `make(task, count)`, in the order of tasks.

  Args:
    tasks: of each environment.
    make: a vector of `count` environments of one task.
    max_ready: see `ConcatVector`.
  """
  parts = [make(task, tasks.count(task)) for task in sorted(set(tasks))]
  return parts[0] if len(parts) == 1 else ConcatVector(parts, max_ready)


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
