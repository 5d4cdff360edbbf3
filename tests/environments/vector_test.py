"""Vectors of dm_env environments, and vectors of vectors."""

import dm_env
import numpy as np
import pytest
from dm_env import specs as dm_specs
from hypothesis import given, settings
from hypothesis import strategies as st

from impala_jax import types
from impala_jax.environments import catch, concat_vector, specs, vector
from tests import counting


def _counting(count, made, first_id=0, **kwargs):
  """Factories that keep in `made` what they make."""

  def make(i):
    made.append(counting.CountingEnvironment(i, **kwargs))
    return made[-1]

  return [lambda i=i: make(i) for i in range(first_id, first_id + count)]


_LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)
_LIMITS = st.lists(st.booleans(), min_size=1, max_size=3).map(tuple)


@settings(max_examples=30, deadline=None)
@given(_LENGTHS, _LIMITS, st.integers(1, 4), st.integers(0, 4))
def test_sequential_contract(lengths, limits, count, max_ready):
  made: list[counting.CountingEnvironment] = []
  factories = _counting(count, made, lengths=lengths, time_limits=limits)
  made_vector = vector.SequentialVector(
    factories, np.arange(count) + 7, max_ready=max_ready
  )
  ends = counting.check_vector_contract(made_vector, 20)
  for env_id in range(count):
    mine = [e for e in ends if e.env_id == env_id]
    for k, end in enumerate(mine):
      length = lengths[k % len(lengths)]
      assert end == (
        env_id + 7,
        sum(counting.CountingEnvironment.reward(k, s) for s in range(1, length + 1)),
        length,
        limits[k % len(limits)],
        env_id,
      )


def _drive(driven, steps, batch):
  """Gives environment i the action (i + its count) % 4; its observations."""
  seen = [[] for _ in range(driven.num_envs)]
  driven.reset(0)
  sizes = []
  while min(len(s) for s in seen) < steps:
    ready = driven.recv(1.0)
    ids = ready.env_ids
    sizes.append(len(ids))
    for k, i in enumerate(ids):
      seen[i].append(ready.timestep.observation[k].tolist())
    driven.send(ids, np.array([(i + len(seen[i])) % 4 for i in ids], np.int32))
  assert max(sizes) <= batch
  return seen


@pytest.mark.parametrize('batch', [6, 4, 2])
def test_actions_reach_the_environment_they_are_meant_for(batch):
  made: list[counting.CountingEnvironment] = []
  parts = [
    vector.SequentialVector(
      _counting(n, made, first, lengths=(3,)), [task] * n, min(n, batch)
    )
    for task, (n, first) in enumerate([(1, 0), (3, 1), (2, 4)])
  ]
  joined = concat_vector.ConcatVector(parts, batch)
  assert joined.task_ids.tolist() == [0, 1, 1, 1, 2, 2]
  seen = _drive(joined, 9, batch)
  for i, environment in enumerate(made):
    # Each episode has 3 steps, so 4 time steps, and one more action after its LAST.
    assert seen[i][:9] == [[i, t // 4, t % 4] for t in range(9)]
    assert environment.actions[:8] == [
      (t // 4, t % 4, (i + t + 1) % 4) for t in range(8)
    ]


@pytest.mark.parametrize('batch', [0, 3])
def test_concat_contract(batch):
  parts = [
    vector.SequentialVector(
      [lambda i=i: counting.CountingEnvironment(i, (2, 5), (True, False))] * n, [i] * n
    )
    for i, n in enumerate([2, 1, 3])
  ]
  joined = concat_vector.ConcatVector(parts, batch)
  ends = counting.check_vector_contract(joined, 30)
  assert {(e.env_id, e.task_id) for e in ends} == {
    (0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2),
  }  # fmt: skip
  joined.close()
  joined.close()


class _Broken:
  """Wraps a vector and breaks one clause of the contract."""

  def __init__(self, clause):
    self._inner = vector.SequentialVector(
      [lambda: counting.CountingEnvironment(0, (3,))] * 2
    )
    self._clause = clause
    self._shared = np.zeros((2, 3), np.int32)

  def __getattr__(self, name):
    return getattr(self._inner, name)

  def recv(self, timeout):
    if self._clause == 'no timeout' and not self._inner._pending:
      self._inner.send(np.arange(2), np.zeros(2, np.int32))
    ready = self._inner.recv(timeout)
    step = ready.timestep
    if self._clause == 'aliasing':
      self._shared[:] = step.observation
      step = step._replace(observation=self._shared)
    elif self._clause == 'dtype':
      step = step._replace(reward=step.reward.astype(np.float64))
    elif self._clause == 'no last':
      step.step_type[step.step_type == types.StepType.LAST] = types.StepType.MID
    elif self._clause == 'discount':
      step.discount[:] = 0
    elif self._clause == 'nan':
      step.reward[0] = np.nan
    elif self._clause == 'episodes':
      ready = ready._replace(
        episodes=[e._replace(episode_return=0.0) for e in ready.episodes]
      )
    elif self._clause == 'ids':
      ready.env_ids[:] = 1
    return ready._replace(timestep=step)


@pytest.mark.parametrize(
  'clause',
  ['aliasing', 'dtype', 'no last', 'discount', 'nan', 'episodes', 'ids', 'no timeout'],
)
def test_the_contract_check_sees(clause):
  with pytest.raises(AssertionError):
    counting.check_vector_contract(_Broken(clause), 12)


def test_reset_with_a_seed_decides_everything():
  seeded = vector.SequentialVector([lambda seed: catch.Catch(seed=seed)] * 4)
  boards = []
  for seed in (1, 2, 1):
    seeded.reset(seed)
    boards.append(seeded.recv(1.0).timestep.observation)
  np.testing.assert_array_equal(boards[0], boards[2])
  assert not np.array_equal(boards[0], boards[1])
  assert len(np.unique(boards[0].argmax(-1)[:, 0])) > 1, 'all balls fall alike'


class _Odd(dm_env.Environment):
  """Specs and steps as given."""

  def __init__(self, observation_spec, step=None, action_spec=None):
    self._observation_spec = observation_spec
    self._action_spec = action_spec or dm_specs.DiscreteArray(2)
    self._step = step
    self.closed = 0

  def observation_spec(self):
    return self._observation_spec

  def action_spec(self):
    return self._action_spec

  def reset(self):
    return self._step

  def step(self, action):
    return self._step

  def close(self):
    self.closed += 1


def test_observations_become_what_jax_holds():
  given_specs = {
    'f64': dm_specs.Array((2,), np.float64),
    'i64': dm_specs.Array((), np.int64),
    'bool': dm_specs.Array((1,), bool),
    'u8': dm_specs.Array((2, 1), np.uint8),
  }
  values = {k: np.ones(s.shape, s.dtype) for k, s in given_specs.items()}
  odd = vector.SequentialVector([lambda: _Odd(given_specs, dm_env.restart(values))])
  assert odd.spec == types.EnvironmentSpec(
    {
      'f64': types.ArraySpec((2,), np.dtype(np.float32)),
      'i64': types.ArraySpec((), np.dtype(np.int32)),
      'bool': types.ArraySpec((1,), np.dtype(np.uint8)),
      'u8': types.ArraySpec((2, 1), np.dtype(np.uint8)),
    },
    2,
  )
  odd.reset(0)
  observation = odd.recv(1.0).timestep.observation
  for k, s in odd.spec.observation.items():
    assert (observation[k].shape, observation[k].dtype) == ((1, *s.shape), s.dtype)
    assert (observation[k] == 1).all()


_BOX = dm_specs.Array((2,), np.float32)


@pytest.mark.parametrize(
  ('environment', 'text'),
  [
    (_Odd(dm_specs.Array((), object)), "'observation' is .* must be .* numbers"),
    (_Odd({'text': dm_specs.StringArray(())}), "'text' is"),
    (_Odd({'a': {'b': _BOX}}), "'a' is .*flatten"),
    (_Odd([_BOX]), 'dict of such'),
    (_Odd(_BOX, action_spec=_BOX), 'action spec is .*DiscreteArray'),
  ],
)
def test_impossible_specs(environment, text):
  with pytest.raises(ValueError, match=text):
    specs.environment_spec(environment)


@pytest.mark.parametrize(
  ('step', 'text'),
  [
    (
      dm_env.restart(np.zeros(1)),
      r"'observation' has shape \[1\]: its spec says \[2\]",
    ),
    (dm_env.restart(None), 'has shape'),
    (dm_env.transition(np.zeros(2), np.zeros(2)), 'reward is .* one number'),
    (dm_env.transition(None, np.zeros(2)), 'reward is None'),
    (dm_env.transition(0.0, np.zeros(2), [1.0]), 'discount is'),
  ],
)
def test_an_environment_that_breaks_its_spec(step, text):
  broken = vector.SequentialVector([lambda: _Odd(_BOX, step)])
  broken.reset(0)
  with pytest.raises(ValueError, match=text):
    broken.recv(1.0)


def test_misuse():
  make = lambda n=3: vector.SequentialVector([counting.CountingEnvironment] * n)
  with pytest.raises(ValueError, match='factories is empty'):
    vector.SequentialVector([])
  with pytest.raises(ValueError, match='vectors is empty'):
    concat_vector.ConcatVector([])
  with pytest.raises(ValueError, match=r'task_ids has shape \[2\]: must be \[1\]'):
    vector.SequentialVector([counting.CountingEnvironment], [1, 2])
  other = lambda: counting.CountingEnvironment(num_actions=9)
  with pytest.raises(ValueError, match='environment 1 has'):
    vector.SequentialVector([counting.CountingEnvironment, other])
  with pytest.raises(ValueError, match='environment 1 has'):
    concat_vector.ConcatVector([make(), vector.SequentialVector([other])])
  for misused in (make(), concat_vector.ConcatVector([make(1), make(2)])):
    misused.reset(0)
    misused.recv(1.0)
    for ids, actions in [([0, 0], [0, 0]), ([9], [0]), ([-1], [0]), ([0], [4])]:
      with pytest.raises(ValueError, match='must'):
        misused.send(np.array(ids), np.array(actions))
    with pytest.raises(TimeoutError):
      misused.recv(0.01)
    misused.send(np.array([2]), np.array([0]))
    assert misused.recv(1.0).env_ids.tolist() == [2]
  odd = _Odd(_BOX)
  closed = vector.SequentialVector([lambda: odd])
  closed.close()
  closed.close()
  assert odd.closed == 1
  with pytest.raises(RuntimeError, match='closed'):
    closed.recv(1.0)
