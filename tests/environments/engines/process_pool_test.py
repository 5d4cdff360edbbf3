"""The pool of engine processes while its engines do as they should."""

import os
import time

import numpy as np
import pytest

from impala_jax import types
from impala_jax.environments import base, catch, specs
from impala_jax.environments.engines import pool as process_pool
from tests import counting
from tests.environments.engines import failing_engines as engines
from tests.environments.engines.failing_engines import act

MIXED = types.EnvironmentSpec(
  {
    'frame': types.ArraySpec((2, 4, 3), np.dtype(np.uint8)),
    'count': types.ArraySpec((), np.dtype(np.int32)),
  },
  4,
)


def recv_all(pool, count=None, timeout=60.0):
  """Receives until `count` environments (default all) came; their observations."""
  found = {}
  while len(found) < (count or pool.num_envs):
    ready = pool.recv(timeout)
    found.update(zip(ready.env_ids.tolist(), ready.timestep.observation, strict=True))
  return found


@pytest.mark.parametrize('max_ready', [0, 2])
def test_contract(make, max_ready):
  lengths, limits = (1, 4, 2), (False, True)
  pool = make(
    [
      engines.spec('count', env_id=i, lengths=lengths, time_limits=limits)
      for i in range(3)
    ],
    max_ready=max_ready,
  )
  ends = counting.check_vector_contract(pool, 60)
  for i in range(3):
    mine = [e for e in ends if e.env_id == i]
    assert len(mine) >= 10
    for k, end in enumerate(mine):
      length = lengths[k % 3]
      total = sum(counting.CountingEnvironment.reward(k, s + 1) for s in range(length))
      assert end == (i, total, length, limits[k % 2], i)


def test_contract_of_dicts_and_the_picture(make):
  pool = make([engines.spec('mixed', lengths=(3,))] * 2, MIXED)
  assert pool.frame() is None
  counting.check_vector_contract(pool, 20)
  pool.reset(0)
  for step in range(4):
    ids, pictures, counts = [], [], []
    while len(ids) < 2:
      ready = pool.recv(60.0)
      ids += ready.env_ids.tolist()
      pictures += list(ready.timestep.observation['frame'])
      counts += ready.timestep.observation['count'].tolist()
    assert counts == [0, 0]
    for picture in (*pictures, pool.frame()):
      np.testing.assert_array_equal(picture, np.full((2, 4, 3), step))
    act(pool, ids)


def test_a_vector_of_numbers_has_no_picture(make):
  pool = make([engines.spec('count')])
  pool.reset(0)
  pool.recv(60.0)
  assert pool.frame() is None


@pytest.mark.parametrize('max_ready', [0, 2])
def test_every_action_reaches_its_environment_and_no_step_is_lost(make, max_ready):
  pool = make(
    [engines.spec('echo', env_id=i, lengths=(10_000,)) for i in range(4)],
    max_ready=max_ready,
  )
  pool.reset(0)
  rng = np.random.default_rng(0)
  sent, steps = [-1] * 4, [0] * 4
  while min(steps) < 200:
    ready = pool.recv(60.0)
    assert len(ready.env_ids) <= (max_ready or 4)
    assert not ready.restarted
    assert not ready.failures
    for i, observation in zip(ready.env_ids, ready.timestep.observation, strict=True):
      assert observation.tolist() == [i, sent[i], steps[i]]
      steps[i] += 1
    actions = rng.integers(0, 4, len(ready.env_ids))
    for i, action in zip(ready.env_ids, actions, strict=True):
      sent[i] = int(action)
    pool.send(ready.env_ids, actions.astype(np.int32))


@pytest.mark.parametrize(
  ('slow', 'lengths', 'played', 'state'),
  [('slow_to_reset', (2,), 3, 'in reset'), ('slow_to_step', (5,), 2, 'in step')],
)
def test_a_slow_engine_holds_up_nobody(make, slow, lengths, played, state):
  """The first environment's second episode, or step, takes longer than this test."""
  pool = make(
    [engines.spec(slow, seconds=3600, lengths=lengths)]
    + [engines.spec('count', env_id=i) for i in (1, 2)]
  )
  pool.reset(0)
  steps = np.zeros(3, int)
  others = None  # Steps of the others when the slow one stops.
  deadline = time.monotonic() + 60  # Its process may start late.
  while others is None or steps[1:].min() < others + 300:
    ready = pool.recv(60.0)
    steps[ready.env_ids] += 1
    act(pool, ready.env_ids)
    if others is None and steps[0] == played:
      others = steps[1:].max()
    assert others is not None or time.monotonic() < deadline
  assert steps[0] == played
  assert pool.stats()['states'][0] == state


def test_steps_are_waited_for(make):
  """Once all play, each `recv` returns those that are not in a reset."""
  pool = make([engines.spec('slow_to_step', seconds=0.1, lengths=(2,))] * 3)
  pool.reset(0)
  act(pool, list(recv_all(pool)))  # First steps.
  act(pool, list(recv_all(pool)))  # Second ones: all are slow.
  pool._usual = 10.0  # Seconds, as if all steps had been slower still.
  assert len(pool.recv(60.0).env_ids) == 3


def test_seeds(make):
  pool = make([engines.spec('told')] * 3)
  seeds = []
  for seed in (1, 2, 1):
    pool.reset(seed)
    seeds.append([int(x[0]) for _, x in sorted(recv_all(pool).items())])
  assert seeds[0] == seeds[2]
  assert len({*seeds[0], *seeds[1]}) == 6
  assert all(0 <= x < 2**31 for x in seeds[0])


def test_reset_in_mid_episode(make):
  pool = make([engines.spec('count', env_id=i) for i in range(2)])
  pool.reset(0)
  act(pool, list(recv_all(pool)))
  pids = pool.stats()['pids']
  pool.reset(1)
  found = recv_all(pool)
  assert {i: x.tolist() for i, x in found.items()} == {0: [0, 0, 0], 1: [1, 0, 0]}
  assert not set(pids) & set(pool.stats()['pids'])
  assert pool.stats()['failures'] == {}
  act(pool, [0, 1])
  assert [x.tolist()[2] for x in recv_all(pool).values()] == [1, 1]


def test_timeouts(make):
  pool = make([engines.spec('slow_to_reset', seconds=3600, lengths=(1,))])
  pool.reset(0)
  for _ in range(2):
    act(pool, pool.recv(60.0).env_ids)
  with pytest.raises(TimeoutError, match=r'none of 1 .* in 0.05 s: 1 in reset'):
    pool.recv(0.05)


def test_nothing_to_wait_for(make):
  pool = make([engines.spec('count')])
  pool.reset(0)
  pool.recv(60.0)
  with pytest.raises(TimeoutError, match='1 waits for an action'):
    pool.recv(3600.0)


def test_send_is_checked(make):
  pool = make([engines.spec('count')] * 2)
  pool.reset(0)
  with pytest.raises(ValueError, match=r'env_ids are \[0\].*an action, \[\]'):
    act(pool, [0])
  recv_all(pool)
  for ids in ([0, 0], [2], [-1]):
    with pytest.raises(ValueError, match=r'must be distinct and .* \[0, 1\]'):
      act(pool, ids)
  with pytest.raises(ValueError, match=r'actions are \[4, 4\]: must be 2 .* \[0, 4\)'):
    act(pool, [0, 1], 4)
  act(pool, [1, 0], 3)
  recv_all(pool)


@pytest.mark.parametrize(
  ('change', 'text'),
  [
    ({'engines': []}, 'engines is empty'),
    ({'task_ids': [0]}, r'task_ids has shape \[1\]: must be \[2\]'),
    ({'step_timeout': 0}, 'step_timeout is 0'),
    ({'reset_timeout': -1}, 'reset_timeout is -1'),
    ({'max_ready': -1}, 'max_ready is -1'),
    ({'max_restarts': -1}, 'max_restarts is -1'),
    ({'engines': [process_pool.EngineSpec('catch')] * 2}, "'catch': must be package"),
  ],
)
def test_arguments_are_checked(change, text):
  arguments = {
    'engines': [engines.spec('count')] * 2,
    'task_ids': [0, 0],
    'spec': engines.COUNTING,
  }
  with pytest.raises(ValueError, match=text):
    process_pool.ProcessPool(**(arguments | change))


def test_a_closed_pool_says_so(make):
  pool = make([engines.spec('count')])
  pool.close()
  pool.close()
  for call in (lambda: pool.reset(0), lambda: pool.recv(0.0), lambda: act(pool, [0])):
    with pytest.raises(RuntimeError, match='ProcessPool was closed'):
      call()


def test_an_environment_that_is_not_as_its_spec_is_refused(make):
  wrong = specs.environment_spec(catch.Catch())
  pool = make([engines.spec('count')], wrong)
  pool.reset(0)
  with pytest.raises(base.EngineError, match=r'count made .*its pool expects'):
    recv_all(pool)


def test_file_descriptors_are_closed():
  """Those of the pool; a first one may open some that stay, of libraries."""

  def play():
    pool = engines.pool([engines.spec('count')] * 2)
    pool.reset(0)
    recv_all(pool)
    pool.close()
    return sorted(os.listdir('/proc/self/fd'))

  assert len(play()) == len(play())
