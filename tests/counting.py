"""An environment that counts, and the contract that every vector must keep."""

import itertools

import dm_env
import numpy as np
from dm_env import specs

from impala_jax import types
from impala_jax.environments import base


class CountingEnvironment(dm_env.Environment):
  """Says in each observation who it is and how far it is.

  Observation: int32 [3], (env_id, episode, step), episodes and steps from 0.
  Reward of the transition to step s of episode e: `reward(e, s)`.
  Episode e has `lengths[e % len(lengths)]` transitions. Those e for which
  `time_limits[e % len(time_limits)]` is true end with discount 1.

  Attributes:
    actions: every action given to `step`, with the step it was given at:
      (episode, step, action). The one after a LAST step is there too.
  """

  def __init__(
    self,
    env_id: int = 0,
    lengths: tuple[int, ...] = (5,),
    time_limits: tuple[bool, ...] = (False,),
    num_actions: int = 4,
  ):
    self._env_id = env_id
    self._lengths = lengths
    self._time_limits = time_limits
    self._num_actions = num_actions
    self._episode = -1
    self._step = 0
    self._over = True
    self.actions: list[tuple[int, int, int]] = []

  @staticmethod
  def reward(episode: int, step: int) -> float:
    """A number that tells both, exact in float32."""
    return 1000.0 * episode + step

  def length(self, episode: int) -> int:
    return self._lengths[episode % len(self._lengths)]

  def time_limit(self, episode: int) -> bool:
    return self._time_limits[episode % len(self._time_limits)]

  def reset(self) -> dm_env.TimeStep:
    self._episode += 1
    self._step = 0
    self._over = False
    return dm_env.restart(self._observation())

  def step(self, action: int) -> dm_env.TimeStep:
    self.actions.append((self._episode, self._step, int(action)))
    if self._over:
      return self.reset()
    self._step += 1
    self._over = self._step == self.length(self._episode)
    reward = self.reward(self._episode, self._step)
    if not self._over:
      return dm_env.transition(reward, self._observation())
    if self.time_limit(self._episode):
      return dm_env.truncation(reward, self._observation())
    return dm_env.termination(reward, self._observation())

  def observation_spec(self) -> specs.Array:
    return specs.Array((3,), np.int32, 'counts')

  def action_spec(self) -> specs.DiscreteArray:
    return specs.DiscreteArray(self._num_actions)

  def _observation(self) -> np.ndarray:
    return np.array([self._env_id, self._episode, self._step], np.int32)


def check_vector_contract(
  vector: base.VectorEnvironment,
  steps: int,
  *,
  seed: int = 0,
  cut_episodes: bool = False,
) -> list[base.EpisodeEnd]:
  """Plays `steps` time steps of each environment with random actions and checks all.

  Args:
    vector: anything that says it is a `base.VectorEnvironment`; not closed here.
    steps: `recv` is called until every environment gave so many time steps.
    seed: for `vector.reset` and the actions.
    cut_episodes: a LAST step need not end an episode as a person counts it, and
      the return may hold rewards that no time step carried.

  Returns:
    The episodes that ended.

  Raises:
    AssertionError: says which clause was broken.
  """
  n = vector.num_envs
  rng = np.random.default_rng(seed)
  assert vector.task_ids.shape == (n,)
  assert vector.task_ids.dtype == np.int32
  last_type = np.full(n, -1)
  total, length, given = np.zeros(n), np.zeros(n, int), np.zeros(n, int)
  kept: list[tuple[base.Ready, base.Ready]] = []
  ended: list[base.EpisodeEnd] = []
  vector.reset(seed)
  waiting: set[int] = set()
  while given.min() < steps:
    ready = vector.recv(timeout=30.0)
    _check_arrays(ready, vector)
    ids = ready.env_ids.tolist()
    assert not waiting & set(ids), f'{ids} came again without an action'
    waiting |= set(ids)
    expected: list[tuple[float, ...]] = []
    for k, i in enumerate(ids):
      kind = int(ready.timestep.step_type[k])
      begins = last_type[i] in (-1, types.StepType.LAST)
      assert (kind == types.StepType.FIRST) == begins, (
        f'environment {i} gave step type {kind} after {last_type[i]}'
      )
      reward = float(ready.timestep.reward[k])
      discount = float(ready.timestep.discount[k])
      if begins:
        assert (reward, discount) == (0.0, 1.0), f'FIRST has {reward}, {discount}'
        total[i] = length[i] = 0
      else:
        total[i] += reward
        length[i] += 1
      assert kind == types.StepType.LAST or discount == 1.0, 'discount before LAST'
      if kind == types.StepType.LAST:
        expected.append((i, vector.task_ids[i], total[i], length[i], discount))
      last_type[i] = kind
      given[i] += 1
    assert all(np.isfinite(e.episode_return) and e.length >= 1 for e in ready.episodes)
    if cut_episodes:
      assert {e.env_id for e in ready.episodes} <= {x[0] for x in expected}
    else:
      found = [
        (e.env_id, e.task_id, e.episode_return, e.length, e.truncated)
        for e in ready.episodes
      ]
      np.testing.assert_allclose(sorted(found), sorted(expected), rtol=1e-5)
    ended += ready.episodes
    kept.append((ready, _copied(ready)))
    kept = kept[-50:]
    actions = rng.integers(0, vector.spec.num_actions, len(ids)).astype(np.int32)
    order = rng.permutation(len(ids))  # Any order is as good.
    vector.send(ready.env_ids[order], actions[order])
    waiting -= set(ids)
  for now, then in kept:
    for a, b in zip(_leaves(now), _leaves(then), strict=True):
      np.testing.assert_array_equal(a, b, 'an array changed after it was handed out')
  _check_disjoint([r for r, _ in kept])
  _check_timeout(vector, rng)
  return ended


def _check_arrays(ready: base.Ready, vector: base.VectorEnvironment) -> None:
  k = len(ready.env_ids)
  assert ready.env_ids.dtype == np.int32
  assert k >= 1
  assert len(set(ready.env_ids.tolist())) == k, f'{ready.env_ids} are not distinct'
  assert ready.env_ids.min() >= 0
  assert ready.env_ids.max() < vector.num_envs
  step = ready.timestep
  for x, dtype in zip(step[:3], (np.uint8, np.float32, np.float32), strict=True):
    assert isinstance(x, np.ndarray)
    assert x.shape == (k,)
    assert x.dtype == dtype
  assert set(step.step_type.tolist()) <= {0, 1, 2}
  assert set(step.discount.tolist()) <= {0.0, 1.0}
  assert np.isfinite(step.reward).all()
  spec = vector.spec.observation
  pairs = (
    [(step.observation[name], s) for name, s in spec.items()]
    if isinstance(spec, dict)
    else [(step.observation, spec)]
  )
  for x, s in pairs:
    assert isinstance(x, np.ndarray)
    assert x.shape == (k, *s.shape)
    assert x.dtype == s.dtype


def _check_timeout(vector: base.VectorEnvironment, rng: np.random.Generator) -> None:
  """Without actions every environment comes once at most, then TimeoutError."""
  got = 0
  try:
    while got < vector.num_envs:
      ready = vector.recv(timeout=5.0)
      got += len(ready.env_ids)
    vector.recv(timeout=0.05)
  except TimeoutError:
    return
  raise AssertionError('recv returned although no environment had an action')


def _leaves(ready: base.Ready) -> list[np.ndarray]:
  observation = ready.timestep.observation
  values = observation.values() if isinstance(observation, dict) else [observation]
  return [ready.env_ids, *ready.timestep[:3], *values]


def _copied(ready: base.Ready) -> base.Ready:
  observation = ready.timestep.observation
  copied = (
    {k: v.copy() for k, v in observation.items()}
    if isinstance(observation, dict)
    else observation.copy()
  )
  parts = [x.copy() for x in ready.timestep[:3]]
  return base.Ready(
    ready.env_ids.copy(), types.TimeStep(*parts, observation=copied), ready.episodes
  )


def _check_disjoint(kept: list[base.Ready]) -> None:
  for a, b in itertools.pairwise(kept):
    for x, y in zip(_leaves(a), _leaves(b), strict=True):
      assert not np.may_share_memory(x, y), 'two results share an array'
