"""Whole episodes from vectors that are ready in parts, fail and stall."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest

from impala_jax import types
from impala_jax.agents import agent as agent_lib
from impala_jax.environments import base
from impala_jax.evaluation import playing

_WRONG = 99


class _Traces:
  """How often a policy was compiled, and which of the two ways to act."""

  def __init__(self):
    self.count = collections.Counter()


def _counting_agent():
  """Acts by the number of steps since FIRST.

  It has this from its recurrent state and from its last action; where these do not
  agree, or belong to another environment, it takes the action `_WRONG`.
  """
  traces = _Traces()

  def make(kind, offset):
    def step(params, key, timestep, last_action, state):
      traces.count[kind] += 1
      first = timestep.step_type == types.StepType.FIRST
      state = jnp.where(first, 0, state + 1)
      follows = jnp.where(first, 0, last_action + 1 - offset)
      action = jnp.where(state == follows, state, _WRONG) + offset
      zeros = jnp.zeros(len(action))
      return agent_lib.AgentStep(action, zeros, zeros, zeros, state)

    return step

  agent = agent_lib.Agent(
    init=lambda key: {},
    initial_state=lambda n: jnp.full(n, 50, jnp.int32),
    unroll=None,
    step=make('step', 0),
    greedy_step=make('greedy', 1),
  )
  return agent, traces


class _Patchy:
  """A vector of which random environments are ready, and whose engines fail.

  Episode e of environment i has `lengths[i][e % len]` steps and the return 1000 i + e.
  At each (environment, episode, step) in `crashes` the engine fails once.
  """

  def __init__(self, lengths, crashes=(), seed=0, offset=0):
    self.num_envs = len(lengths)
    self.spec = types.EnvironmentSpec(types.ArraySpec((1,), np.dtype(np.float32)), 200)
    self.task_ids = np.zeros(self.num_envs, np.int32)
    self.batches = []
    self._lengths = lengths
    self._crashes = set(crashes)
    self._rng = np.random.default_rng(seed)
    self._offset = offset

  def reset(self, seed):
    del seed
    self._episode = [-1] * self.num_envs
    self._step = [0] * self.num_envs
    self._over = [True] * self.num_envs
    self._pending = set(range(self.num_envs))

  def send(self, env_ids, actions):
    for i, action in zip(env_ids.tolist(), actions.tolist(), strict=True):
      assert i not in self._pending
      assert action == self._step[i] + self._offset
      self._pending.add(i)

  def recv(self, timeout):
    del timeout
    if self._rng.random() < 0.2:
      raise TimeoutError
    some = self._rng.permutation(sorted(self._pending))
    some = some[: self._rng.integers(1, len(some) + 1)]
    self._pending -= set(some.tolist())
    self.batches.append(len(some))
    kinds, episodes, restarted, failures = [], [], [], []
    for i in some.tolist():
      here = (i, self._episode[i], self._step[i])
      if here in self._crashes:
        self._crashes.remove(here)
        self._step[i] = 0
        restarted.append(i)
        failures.append(base.Failure(i, 0, f'crashed at {here}'))
        kinds.append(types.StepType.FIRST)
      elif self._over[i]:
        self._over[i] = False
        self._step[i] = 0
        self._episode[i] += 1
        kinds.append(types.StepType.FIRST)
      else:
        self._step[i] += 1
        lengths = self._lengths[i]
        length = lengths[self._episode[i] % len(lengths)]
        self._over[i] = self._step[i] == length
        kinds.append(types.StepType.LAST if self._over[i] else types.StepType.MID)
        if self._over[i]:
          value = 1000.0 * i + self._episode[i]
          episodes.append(base.EpisodeEnd(0, value, length, False, i))
    count = len(some)
    timestep = types.TimeStep(
      np.array(kinds, np.uint8),
      np.zeros(count, np.float32),
      np.ones(count, np.float32),
      np.zeros((count, 1), np.float32),
    )
    return base.Ready(some.astype(np.int32), timestep, episodes, restarted, failures)

  def close(self):
    pass


def _returns(episodes):
  return sorted(e.episode_return for e in episodes)


def test_the_first_episodes_of_each_environment():
  """Also of one whose episodes are short, and would end first."""
  agent, traces = _counting_agent()
  vector = _Patchy([(2, 3), (17,), (5, 1, 9), (4,)])
  told = []
  episodes = playing.play(
    agent, {}, vector, seed=0, episodes=[3, 1, 2, 0], on_episode=told.append
  )
  assert _returns(episodes) == [0, 1, 2, 1000, 2000, 2001]
  assert told == episodes
  assert len(set(vector.batches)) > 1
  assert traces.count == {'step': 1}  # One batch shape, however many are ready.


def test_one_episode_each_is_the_default():
  agent, _ = _counting_agent()
  episodes = playing.play(agent, {}, _Patchy([(3,), (8,)]), seed=0)
  assert _returns(episodes) == [0, 1000]


def test_an_engine_that_fails_plays_its_episode_anew():
  agent, _ = _counting_agent()
  crashes = [(0, 0, 2), (0, 1, 0), (1, 1, 3)]
  failures = []
  episodes = playing.play(
    agent,
    {},
    _Patchy([(4, 6), (5,)], crashes),
    seed=0,
    episodes=2,
    on_failure=failures.append,
  )
  assert _returns(episodes) == [0, 1, 1000, 1001]
  assert {e.length for e in episodes} == {4, 5, 6}
  assert sorted(f.cause for f in failures) == sorted(f'crashed at {c}' for c in crashes)


def test_greedy_play():
  agent, traces = _counting_agent()
  playing.play(agent, {}, _Patchy([(3,)], offset=1), seed=0, greedy=True)
  assert traces.count == {'greedy': 1}


class _Stuck(_Patchy):
  def recv(self, timeout):
    del timeout
    raise TimeoutError


def test_no_wait_is_without_an_end():
  agent, _ = _counting_agent()
  with pytest.raises(TimeoutError, match='none of 2 environments became ready'):
    playing.play(agent, {}, _Stuck([(3,), (3,)]), seed=0, patience=0.05)
  answers = iter([False] * 5)
  ended = playing.play(
    agent, {}, _Stuck([(3,)]), seed=0, should_stop=lambda: next(answers, True)
  )
  assert ended == []


def test_each_step_can_be_looked_at_before_the_next():
  agent, _ = _counting_agent()
  vector = _Patchy([(50,)])
  steps = []

  def look():
    assert not vector._pending  # Some vectors only have their picture until then.
    steps.append(vector._step[0])

  playing.play(agent, {}, vector, seed=0, max_steps=7, on_step=look)
  assert steps == [0, 1, 2, 3, 4, 5, 6]
