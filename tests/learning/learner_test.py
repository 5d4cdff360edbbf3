"""The update: the same on any number of devices, and proof against bad batches."""

import jax
import numpy as np
import pytest

from impala_jax.learning import learner as learner_lib
from tests import synthetic


def _run(devices: int, updates: int, cfg=None) -> learner_lib.LearnerState:
  cfg = cfg or synthetic.config()
  learner = synthetic.make_learner(cfg, devices)
  state = learner.init(0)
  for i in range(updates):
    state, _, _ = learner.update(state, learner.put(synthetic.rows(i)))
  return learner_lib.to_host(state)


def test_time_major_swaps_time_and_batch_only():
  batch = synthetic.layout().unpack(synthetic.rows(1))
  swapped = learner_lib.time_major(batch)
  assert swapped.action.shape == (5, 4)
  assert swapped.timestep.observation.shape == (6, 4, 3, 2)
  np.testing.assert_array_equal(swapped.action.T, batch.action)
  jax.tree.map(np.testing.assert_array_equal, swapped.agent_state, batch.agent_state)


@pytest.mark.parametrize('devices', [2, 4])
def test_any_number_of_devices_gives_the_same_update(devices):
  if jax.local_device_count() < devices:
    pytest.skip(f'{jax.local_device_count()} devices here')
  one, many = _run(1, 3), _run(devices, 3)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), one, many
  )


def test_update_changes_parameters():
  before, after = _run(1, 0), _run(1, 1)
  moved = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), before.params, after.params
  )
  assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize('devices', [1, 2])
def test_a_batch_that_is_not_finite_is_skipped_and_counted(devices):
  learner = synthetic.make_learner(synthetic.config(), devices)
  state = learner.init(0)
  state, _, _ = learner.update(state, learner.put(synthetic.rows(0)))
  before = learner_lib.to_host(state)
  before = jax.tree.map(np.copy, before)
  poison = synthetic.rows(1)
  # In one row only, so that with two devices one of them sees sound data.
  synthetic.layout().views(poison[0]).timestep.observation[3] = np.nan
  state, params, figures = learner.update(state, learner.put(poison))
  after = learner_lib.to_host(state)
  jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
  jax.tree.map(np.testing.assert_array_equal, before.opt_state, after.opt_state)
  jax.tree.map(
    np.testing.assert_array_equal, before.params, learner_lib.to_host(params)
  )
  assert int(after.skipped) == 1
  assert int(after.updates) == 2
  assert int(learner_lib.to_host(figures)['skipped']) == 1
  state, _, _ = learner.update(state, learner.put(synthetic.rows(2)))
  good = learner_lib.to_host(state)
  assert int(good.skipped) == 1
  assert np.isfinite(jax.tree.leaves(good.params)[0]).all()


def test_published_parameters_outlive_the_donated_state():
  learner = synthetic.make_learner(synthetic.config())
  state, params, _ = learner.update(learner.init(0), learner.put(synthetic.rows(0)))
  expected = jax.tree.map(np.copy, learner_lib.to_host(params))
  for i in range(3):
    state, _, _ = learner.update(state, learner.put(synthetic.rows(i + 1)))
  jax.tree.map(np.testing.assert_array_equal, expected, learner_lib.to_host(params))


@pytest.mark.parametrize('devices', [1, 2])
def test_nothing_is_compiled_after_the_first_update(caplog, devices):
  learner = synthetic.make_learner(synthetic.config(), devices)
  state, _, _ = learner.update(learner.init(0), learner.put(synthetic.rows(0)))
  with jax.log_compiles():
    for i in range(3):
      state, _, _ = learner.update(state, learner.put(synthetic.rows(i)))
  compiled = [r.message for r in caplog.records if 'XLA compilation' in r.message]
  assert not compiled


def test_batch_that_does_not_divide_is_refused():
  learner = synthetic.make_learner(synthetic.config(), 2)
  with pytest.raises(ValueError, match=r'batch of 3 unrolls.*2 devices'):
    learner.put(synthetic.rows(0, batch=3))
