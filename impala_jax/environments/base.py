"""The interface between actors and environments: many at a time, `send`/`recv`.

An actor drives a `VectorEnvironment`. Single environments (any
`dm_env.Environment`, gymnasium through `gymnasium_adapter`) are made into one by
`environments.vector.SequentialVector`.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from impala_jax import types


class EpisodeEnd(NamedTuple):
  """A finished episode as a person would count it.

  It ends where the game ends, not where training cuts it (a lost life), and its
  return is the sum of the raw rewards.
  """

  task_id: int
  episode_return: float
  length: int  # Agent steps.
  truncated: bool  # Ended by a time limit.
  env_id: int = -1  # Which environment of the vector it was.


class EngineError(RuntimeError):
  """An environment's engine cannot be had; the text says which and why."""


class EngineMistake(EngineError):
  """An engine that cannot be as it is configured: another try would not help."""


class Failure(NamedTuple):
  """An engine that died, hung or refused, and is being replaced.

  Attributes:
    env_id: of its environment.
    task_id: of its level.
    cause: for people: level, seed, and how it ended.
    given_up: the environment plays this level no more.
    instead: the task that it plays from now on; -1 for none.
  """

  env_id: int
  task_id: int
  cause: str
  given_up: bool = False
  instead: int = -1


class Ready(NamedTuple):
  """Environments that have a new time step and wait for an action.

  The arrays belong to the receiver: the environment does not write to them again.
  An environment whose engine failed is missing until the new engine has its FIRST
  step; its id is then in `restarted`, and whatever was collected of it since its
  last whole unroll must not be learned from.
  """

  env_ids: np.ndarray  # int32 [K], distinct, each in [0, num_envs).
  timestep: types.TimeStep  # [K, ...]
  episodes: list[EpisodeEnd]  # Those that ended with these time steps.
  restarted: Sequence[int] = ()  # Those of `env_ids` whose engine is a new one.
  failures: Sequence[Failure] = ()  # Of engines, since the last `Ready`.


def checked_actions(
  env_ids: np.ndarray, actions: np.ndarray, num_actions: int, waiting: Sequence[bool]
) -> tuple[list[int], list[int]]:
  """What `VectorEnvironment.send` was given, as lists.

  Args:
    env_ids: [K].
    actions: [K].
    num_actions: of the spec.
    waiting: of each environment, whether it waits for an action.

  Raises:
    ValueError: an action is out of range, or an environment waits for none.
  """
  ids, values = np.asarray(env_ids).tolist(), np.asarray(actions).tolist()
  if len(ids) != len(values) or not all(0 <= a < num_actions for a in values):
    raise ValueError(
      f'actions are {values}: must be {len(ids)} numbers in [0, {num_actions})'
    )
  count = len(waiting)
  if len(set(ids)) != len(ids) or not all(0 <= i < count and waiting[i] for i in ids):
    raise ValueError(
      f'env_ids are {ids}: must be distinct and among those that wait for an '
      f'action, {[i for i in range(count) if waiting[i]]}'
    )
  return ids, values


class VectorEnvironment(Protocol):
  """`num_envs` environments stepped together or as they become ready.

  `reset` starts all of them; then each environment that `recv` returned gets
  exactly one action by `send` before it can be returned again. After a LAST
  step the action is ignored and the next time step is FIRST.
  """

  num_envs: int
  spec: types.EnvironmentSpec
  task_ids: np.ndarray  # int32 [num_envs]

  def reset(self, seed: int) -> None:
    """Begins the first episodes; results come by `recv`."""

  def send(self, env_ids: np.ndarray, actions: np.ndarray) -> None:
    """Takes int32 `actions` [K] in environments `env_ids` [K]."""

  def recv(self, timeout: float) -> Ready:
    """Returns the ready environments (at least one).

    Raises:
      TimeoutError: nothing became ready within `timeout` seconds.
      EngineError: an engine failed too often to be replaced once more.
    """

  def close(self) -> None:
    """Frees threads and processes. Idempotent."""
