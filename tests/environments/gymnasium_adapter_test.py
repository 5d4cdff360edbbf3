import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from impala_jax import types
from impala_jax.environments import adapters as gymnasium_adapter
from impala_jax.environments import specs, vector
from tests import counting


class _Scripted(gymnasium.Env):
  """Ends after `length` steps as told; observes the last action as it came."""

  def __init__(self, observation_space, length=3, ending='terminated', start=0):
    self.observation_space = observation_space
    self.action_space = spaces.Discrete(4, start=start)
    self._length, self._ending = length, ending
    self.seeds = []
    self.closed = False

  def _observe(self, value):
    if isinstance(self.observation_space, spaces.Dict):
      return {'a': np.full((2,), value, np.float64), 'b': value}
    return value

  def reset(self, *, seed=None, options=None):
    self.seeds.append(seed)
    self._steps = 0
    return self._observe(0), {}

  def step(self, action):
    assert self._steps < self._length, 'stepped after the end'
    self._steps += 1
    over = self._steps == self._length
    ending = (over and self._ending == name for name in ('terminated', 'truncated'))
    return self._observe(action), self._steps, *ending, {}

  def close(self):
    self.closed = True


@pytest.mark.parametrize(('ending', 'discount'), [('terminated', 0), ('truncated', 1)])
def test_endings_and_start_of_actions(ending, discount):
  env = _Scripted(spaces.Discrete(20), ending=ending, start=10)
  adapted = gymnasium_adapter.GymnasiumEnvironment(env, seed=5)
  for _ in range(2):
    steps = [adapted.step(a) for a in (3, 0, 1, 2)]
    assert [int(s.step_type) for s in steps] == [0, 1, 1, 2]
    assert [s.reward for s in steps] == [None, 1, 2, 3]
    assert [s.discount for s in steps] == [None, 1, 1, discount]
    assert [int(s.observation) for s in steps] == [0, 10, 11, 12]
  assert env.seeds == [5, None]
  adapted.close()
  assert env.closed


def test_spaces():
  box = spaces.Box(-1.0, 1.0, (2,), np.float64)
  env = _Scripted(spaces.Dict({'a': box, 'b': spaces.Discrete(9)}))
  make = lambda: gymnasium_adapter.GymnasiumEnvironment(env)
  assert specs.environment_spec(make()) == types.EnvironmentSpec(
    {
      'a': types.ArraySpec((2,), np.dtype(np.float32)),
      'b': types.ArraySpec((), np.dtype(np.int32)),
    },
    4,
  )
  ends = counting.check_vector_contract(vector.SequentialVector([make]), 20)
  assert {(e.episode_return, e.length, e.truncated) for e in ends} == {(6.0, 3, False)}


def test_cart_pole_keeps_the_contract():
  def make(seed):
    return gymnasium_adapter.GymnasiumEnvironment(gymnasium.make('CartPole-v1'), seed)

  poles = vector.SequentialVector([make] * 2)
  assert poles.spec.observation == types.ArraySpec((4,), np.dtype(np.float32))
  ends = counting.check_vector_contract(poles, 200)
  assert all(e.episode_return == e.length > 5 for e in ends)
  starts = []
  for seed in (3, 4, 3):
    poles.reset(seed)
    starts.append(poles.recv(1.0).timestep.observation)
  np.testing.assert_array_equal(starts[0], starts[2])
  assert not np.array_equal(starts[0], starts[1])
  assert not np.array_equal(starts[0][0], starts[0][1])
  assert poles.frame() is None
  poles.close()


def test_spaces_that_are_refused():
  env = _Scripted(spaces.Dict({'words': spaces.Text(9)}))
  with pytest.raises(ValueError, match="observation space 'words' is Text"):
    gymnasium_adapter.GymnasiumEnvironment(env)
  env.action_space = spaces.Box(0, 1, (2,))
  with pytest.raises(ValueError, match=r'action space is Box.*must be Discrete'):
    gymnasium_adapter.GymnasiumEnvironment(env)
