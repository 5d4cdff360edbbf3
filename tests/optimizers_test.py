"""Optimisers against NumPy versions of their definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from impala_jax import config, optimizers
from tests import numpy_reference as reference

UPDATES = 8


def make_config(**optimizer):
  base = config.Config()
  frames = base.frames_per_update * UPDATES
  return dataclasses.replace(
    base,
    optimizer=dataclasses.replace(base.optimizer, **optimizer),
    learner=dataclasses.replace(base.learner, total_frames=frames),
  )


def make_gradients(count, scale=1.0):
  rng = np.random.default_rng(0)
  return [rng.normal(size=5).astype(np.float32) * scale for _ in range(count)]


def apply(settings, gradients, frames_ahead=0):
  """Parameters after each update, from all ones, as one jitted function."""
  optimizer = optimizers.make_optimizer(settings, frames_ahead)

  @jax.jit
  def update(parameters, state, gradient):
    updates, state = optimizer.update(gradient, state, parameters)
    return optax.apply_updates(parameters, updates), state

  parameters = jnp.ones(5)
  state = optimizer.init(parameters)
  history = []
  for gradient in gradients:
    parameters, state = update(parameters, state, gradient)
    history.append(np.asarray(parameters))
  return history


def rates(settings, count):
  """Linear to 0, written from the definition."""
  rate = settings.optimizer.learning_rate
  return [rate * max(0, UPDATES - i) / UPDATES for i in range(count)]


@pytest.mark.parametrize('momentum', [0.0, 0.9])
@pytest.mark.parametrize('epsilon', [0.1, 0.01, 1e-5])
def test_rmsprop_is_the_papers(momentum, epsilon):
  settings = make_config(
    momentum=momentum, epsilon=epsilon, learning_rate=0.1, max_grad_norm=0.0
  )
  gradients = make_gradients(UPDATES + 2)
  expected = reference.rmsprop(
    np.ones(5),
    gradients,
    rates(settings, len(gradients)),
    decay=0.99,
    epsilon=epsilon,
    momentum=momentum,
  )
  np.testing.assert_allclose(apply(settings, gradients), expected, rtol=1e-5)


def test_adam():
  settings = make_config(
    name='adam', learning_rate=0.1, epsilon=1e-3, adam_b1=0.8, max_grad_norm=0.0
  )
  gradients = make_gradients(UPDATES)
  expected = reference.adam(
    np.ones(5), gradients, rates(settings, UPDATES), b1=0.8, b2=0.999, epsilon=1e-3
  )
  np.testing.assert_allclose(apply(settings, gradients), expected, rtol=1e-4)


def test_clips_the_global_norm_before_the_optimiser():
  limit = 2.0
  settings = make_config(learning_rate=0.1, max_grad_norm=limit)
  gradients = [np.full(5, 0.1, np.float32), *make_gradients(4, scale=100.0)]
  clipped = [g * min(1, limit / np.linalg.norm(g)) for g in gradients]
  assert np.array_equal(clipped[0], gradients[0])
  expected = reference.rmsprop(
    np.ones(5), clipped, rates(settings, 5), decay=0.99, epsilon=0.01, momentum=0.0
  )
  np.testing.assert_allclose(apply(settings, gradients), expected, rtol=1e-5)


def test_the_norm_is_taken_over_all_parameters():
  settings = make_config(learning_rate=1.0, schedule='constant', max_grad_norm=5.0)
  optimizer = optimizers.make_optimizer(settings)
  gradient = {'a': jnp.array([30.0]), 'b': jnp.array([40.0])}
  updates, _ = optimizer.update(gradient, optimizer.init(gradient))
  expected = [-g / np.sqrt(0.99 + 0.01 * g**2 + 0.01) for g in (3.0, 4.0)]
  actual = [updates['a'][0], updates['b'][0]]
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize('schedule', config.SCHEDULES)
def test_reported_learning_rate_is_the_applied_one(schedule):
  settings = make_config(
    schedule=schedule,
    decay=1 - 1e-9,
    epsilon=1e-12,
    learning_rate=0.25,
    max_grad_norm=0.0,
  )
  # Such a decay keeps the mean square at 1: each step is then the rate itself.
  history = [np.ones(5), *apply(settings, [np.ones(5, np.float32)] * (UPDATES + 2))]
  steps = -np.diff(np.array(history), axis=0)[:, 0]
  reported = [optimizers.learning_rate_at(settings, i) for i in range(UPDATES + 2)]
  np.testing.assert_allclose(steps, reported, atol=1e-6)
  last = 0.25 if schedule == 'constant' else 0.0
  assert reported[0] == 0.25
  assert reported[UPDATES] == last


@pytest.mark.parametrize('ahead', [-1280, 0, 300, 5000])
def test_the_schedule_follows_frames_where_updates_were_of_other_sizes(ahead):
  settings = make_config(
    decay=1 - 1e-9, epsilon=1e-12, learning_rate=0.25, max_grad_norm=0.0
  )
  per_update, total = settings.frames_per_update, settings.learner.total_frames
  updates = range(2, UPDATES)
  expected = [0.25 * max(0, 1 - (i * per_update + ahead) / total) for i in updates]
  reported = [optimizers.learning_rate_at(settings, i, ahead) for i in updates]
  np.testing.assert_allclose(reported, expected, rtol=1e-12)
  ones = [np.ones(5, np.float32)] * UPDATES
  history = [np.ones(5), *apply(settings, ones, ahead)]
  steps = -np.diff(np.array(history), axis=0)[:, 0]
  np.testing.assert_allclose(steps[2:], expected, atol=1e-6)


def test_refuses_unknown_names():
  with pytest.raises(ValueError, match=r"optimizer\.name is 'sgd'.*rmsprop, adam"):
    optimizers.make_optimizer(make_config(name='sgd'))
  for call in (optimizers.make_optimizer, lambda c: optimizers.learning_rate_at(c, 0)):
    with pytest.raises(ValueError, match=r"schedule is 'cosine'.*linear, constant"):
      call(make_config(schedule='cosine'))
