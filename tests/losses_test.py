"""The loss against NumPy on episodes computed apart, with garbage between them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impala_jax import config, losses, types, vtrace
from tests import numpy_reference as reference
from tests import packed_unrolls

T, B, A = packed_unrolls.T, packed_unrolls.B, packed_unrolls.A
ENDS = packed_unrolls.ENDS
OFF_CLIPS = {'rho_clip': 2.5, 'c_clip': 1.2, 'pg_rho_clip': 0.8, 'trace_lambda': 0.9}
LOSSES = (
  config.Loss(),
  config.Loss(**OFF_CLIPS, reward_clipping='soft_asymmetric', baseline_cost=0.7),
  config.Loss(vtrace_method='associative', reward_clipping='none', entropy_cost=0.3),
  config.Loss(**OFF_CLIPS, correction='one_step_is', discount=0.9),
  config.Loss(correction='epsilon_correction', trace_lambda=0.9),
  config.Loss(correction='no_correction', reward_clipping='none'),
)
PARTS = ('policy_loss', 'baseline_loss', 'entropy_loss')


def assert_close(actual, desired):
  np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-4)


@functools.cache
def gradient_of(loss_config):
  return jax.jit(jax.value_and_grad(losses.make_loss(loss_config), has_aux=True))


def apart(loss_config, output, unroll, b, first, last):
  """The NumPy reference on rows first..last of column b."""
  return reference.loss(
    output.logits[first:last, b],
    output.baseline[first : last + 1, b],
    unroll.action[first:last, b],
    unroll.behaviour_log_prob[first:last, b],
    unroll.timestep.reward[first + 1 : last + 1, b],
    unroll.timestep.discount[first + 1 : last + 1, b],
    loss_config,
  )


columns = st.tuples(
  st.lists(st.integers(1, T), unique=True, max_size=5).map(sorted),
  st.lists(st.sampled_from(ENDS), min_size=6, max_size=6),
)


@pytest.mark.parametrize('loss_config', LOSSES)
@settings(max_examples=40, deadline=None)
@given(
  seed=st.integers(0, 2**32 - 1),
  cuts=st.tuples(columns, columns),
  garbage=st.sampled_from([np.nan, np.inf, -np.inf, 1e38, -7.0]),
)
def test_a_packed_unroll_equals_its_episodes_apart(loss_config, seed, cuts, garbage):
  output, unroll = packed_unrolls.make_batch(seed)
  parts = dict.fromkeys(PARTS, 0.0)
  grad_logits = np.zeros(output.logits.shape)
  grad_baseline = np.zeros(output.baseline.shape)
  valid_steps = 0
  for b, (starts, ends) in enumerate(cuts):
    for first, last in packed_unrolls.cut(output, unroll, b, starts, ends, garbage):
      one = apart(loss_config, output, unroll, b, first, last)
      for name in PARTS:
        parts[name] += one[name]
      grad_logits[first:last, b] = one['grad_logits']
      grad_baseline[first : last + 1, b] += one['grad_baseline']
      valid_steps += last - first

  (loss, metrics), gradient = gradient_of(loss_config)(output, unroll)

  for name in PARTS:
    assert_close(metrics[name], parts[name])
  assert_close(loss, sum(parts.values()))
  assert_close(gradient.logits, grad_logits)
  assert_close(gradient.baseline, grad_baseline)
  assert metrics['valid_steps'] == valid_steps
  assert all(np.isfinite(x) for x in metrics.values())


@functools.cache
def vtrace_of(loss_config):
  return jax.jit(
    functools.partial(
      vtrace.vtrace,
      rho_clip=loss_config.rho_clip,
      c_clip=loss_config.c_clip,
      pg_rho_clip=loss_config.pg_rho_clip,
      lambda_=loss_config.trace_lambda,
      correction=loss_config.correction,
      method=loss_config.vtrace_method,
    )
  )


@pytest.mark.parametrize('loss_config', LOSSES)
@settings(max_examples=20, deadline=None)
@given(
  seed=st.integers(0, 2**32 - 1),
  cuts=st.tuples(columns, columns),
  garbage=st.sampled_from([np.nan, np.inf, -np.inf, 1e38, -7.0]),
)
def test_targets_of_a_packed_unroll(loss_config, seed, cuts, garbage):
  """The same property one layer down: v_t and the advantage of every step."""
  output, unroll = packed_unrolls.make_batch(seed)
  names = ('log_rhos', 'discounts', 'rewards')
  inputs = {name: np.full((T, B), garbage, np.float32) for name in names}
  vs, advantages = output.baseline[:-1].astype(np.float64), np.zeros((T, B))
  for b, (starts, ends) in enumerate(cuts):
    for first, last in packed_unrolls.cut(output, unroll, b, starts, ends, garbage):
      one = apart(loss_config, output, unroll, b, first, last)
      for name in names:
        inputs[name][first:last, b] = one[name]
      vs[first:last, b] = one['vs']
      advantages[first:last, b] = one['advantages']
  valid = losses.valid_transitions(unroll.timestep.step_type)
  actual = vtrace_of(loss_config)(
    **inputs, values=output.baseline[:-1], next_values=output.baseline[1:], valid=valid
  )
  assert_close(actual.vs, vs)
  assert_close(actual.pg_advantages, advantages)


def test_time_limits_bootstrap_and_ends_do_not():
  """By hand: two steps, gamma 1/2, on-policy, values far apart."""
  output, unroll = packed_unrolls.make_batch(0, steps=4, batch=1)
  output.baseline[:, 0] = [1.0, 2.0, 10.0, 1000.0, 1000.0]
  output.logits[:] = 0
  unroll.behaviour_log_prob[:] = np.log(1 / A)
  unroll.timestep.reward[:, 0] = 1.0
  settings_ = config.Loss(discount=0.5, baseline_cost=1.0)
  for end, v_0 in (('time_limit', 1 + 0.5 * (1 + 0.5 * 10)), ('end', 1 + 0.5 * 1)):
    copy = jax.tree.map(np.copy, (output, unroll))
    packed_unrolls.cut(*copy, 0, [3], [end, 'restart'], np.nan)
    _, gradient = gradient_of(settings_)(*copy)
    # The baseline's gradient is V - v.
    assert_close(1.0 - gradient.baseline[0, 0], v_0)


def test_metrics_are_what_they_say():
  loss_config = config.Loss(**OFF_CLIPS)
  output, unroll = packed_unrolls.make_batch(3)
  stretches = [
    apart(loss_config, output, unroll, b, first, last)
    for b, starts in enumerate(([4, 9], []))
    for first, last in packed_unrolls.cut(output, unroll, b, starts, ENDS, np.nan)
  ]
  valid = np.asarray(losses.valid_transitions(unroll.timestep.step_type))
  _, metrics = losses.make_loss(loss_config)(output, unroll)
  joined = {
    name: np.concatenate([one[name] for one in stretches])
    for name in ('log_rhos', 'vs', 'advantages', 'entropies')
  }
  # Column by column, as the stretches are.
  values = np.concatenate([output.baseline[:-1, b][valid[:, b]] for b in range(B)])
  rhos = np.exp(joined['log_rhos'])
  expected = {
    'entropy': joined['entropies'].mean(),
    'mean_rho': rhos.mean(),
    'clipped_rho_fraction': (rhos > 2.5).mean(),
    'mean_value': values.mean(),
    'mean_advantage': joined['advantages'].mean(),
    'kl': -joined['log_rhos'].mean(),
    'explained_variance': 1 - np.var(joined['vs'] - values) / np.var(joined['vs']),
    'valid_steps': valid.sum(),
  }
  assert 0 < expected['clipped_rho_fraction'] < 1
  assert metrics.keys() == {*expected, *PARTS}
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    assert metrics[name].dtype == jnp.float32
    assert metrics[name].shape == ()


def test_metrics_of_an_unroll_without_transitions():
  output, unroll = packed_unrolls.make_batch(0)
  unroll.timestep.step_type[:] = types.StepType.FIRST
  loss, metrics = losses.make_loss(config.Loss())(output, unroll)
  assert loss == 0
  for name, value in metrics.items():
    assert value == 0, name


def test_losses_are_sums_over_the_batch():
  """Devices may split the batch: shares add up to the whole."""
  output, unroll = packed_unrolls.make_batch(5, batch=4)
  f = gradient_of(config.Loss())
  (whole, _), gradient = f(output, unroll)
  parts = [
    f(*jax.tree.map(lambda x, b=b: x[:, b : b + 2], (output, unroll))) for b in (0, 2)
  ]
  assert_close(sum(loss for (loss, _), _ in parts), whole)
  joined = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *[g for _, g in parts])
  jax.tree.map(assert_close, joined, gradient)


def test_pmap():
  devices = jax.local_device_count()
  assert devices == 4
  output, unroll = packed_unrolls.make_batch(6, batch=devices)
  f = losses.make_loss(config.Loss())
  split = lambda x: np.moveaxis(x, 1, 0)[:, :, None]
  sharded, _ = jax.pmap(f)(*jax.tree.map(split, (output, unroll)))
  assert_close(sharded.sum(), f(output, unroll)[0])


@pytest.mark.parametrize('bad', [A, -1, 10**6])
def test_a_bad_action_in_a_real_step_is_not_hidden(bad):
  output, unroll = packed_unrolls.make_batch(7)
  unroll.action[3, 1] = bad
  assert np.isnan(losses.make_loss(config.Loss())(output, unroll)[0])


@pytest.mark.parametrize('kind', types.REWARD_CLIPPING)
def test_reward_clipping(kind):
  rewards = np.array([-100, -5, -1, -0.1, 0, 0.1, 1, 5, 100], np.float32)
  expected = [reference.clip_reward(r, kind) for r in rewards.astype(np.float64)]
  np.testing.assert_allclose(losses.clip_rewards(rewards, kind), expected, rtol=1e-6)


def test_reward_clipping_by_hand():
  soft = losses.clip_rewards(np.array([1e4, -1e4, 0.1], np.float32), 'soft_asymmetric')
  np.testing.assert_allclose(soft, [5, -1.5, 0.1], rtol=1e-3)
  with pytest.raises(ValueError, match=r"'clip'.*abs_one, soft_asymmetric, none"):
    losses.clip_rewards(rewards=np.zeros(1), kind='clip')


def test_refuses_wrong_arrays():
  output, unroll = packed_unrolls.make_batch(0)
  f = losses.make_loss(config.Loss())
  for wrong_output, wrong_unroll in (
    (output._replace(baseline=output.baseline[:-1]), unroll),
    (output._replace(logits=output.logits[..., 0]), unroll),
    (output, unroll._replace(action=unroll.action[:, :1])),
    (output, unroll._replace(action=unroll.action.astype(np.float32))),
    (output, unroll._replace(behaviour_log_prob=output.baseline)),
    jax.tree.map(lambda x: x[:1], (output, unroll)),
  ):
    with pytest.raises(AssertionError):
      f(wrong_output, wrong_unroll)


def test_unknown_settings_are_refused():
  batch = packed_unrolls.make_batch(0)
  for field in ('correction', 'reward_clipping', 'vtrace_method'):
    wrong = dataclasses.replace(config.Loss(), **{field: 'other'})
    with pytest.raises(ValueError, match=r"is 'other': must be one of"):
      losses.make_loss(wrong)(*batch)


@pytest.mark.parametrize('loss_config', LOSSES)
def test_forbidden_actions_add_nothing(loss_config):
  """A logit of -inf, against the reference and against the network without it."""
  rng = np.random.default_rng(3)
  steps = 5
  logits = rng.normal(size=(steps + 1, 1, A)).astype(np.float32)
  logits[:, :, 1] = -np.inf
  logits[2, :, 0] = -np.inf
  allowed = np.delete(logits, 1, axis=-1)
  output = types.AgentOutput(logits, rng.normal(size=(steps + 1, 1)).astype('f4'))
  action = np.full((steps, 1), 2, np.int32)
  unroll = types.Unroll(
    timestep=types.TimeStep(
      np.full((steps + 1, 1), types.StepType.MID, np.uint8),
      rng.normal(size=(steps + 1, 1)).astype(np.float32),
      np.ones((steps + 1, 1), np.float32),
      None,
    ),
    action=action,
    behaviour_log_prob=np.full((steps, 1), -1.0, np.float32),
    behaviour_logits=None,
    last_action=None,
    agent_state=None,
    task_id=None,
  )
  (loss, metrics), slopes = gradient_of(loss_config)(output, unroll)
  expected = apart(loss_config, output, unroll, 0, 0, steps)
  assert_close(loss, sum(expected[part] for part in PARTS))
  assert_close(metrics['entropy'], np.mean(expected['entropies']))
  assert_close(slopes.logits[:-1, 0], expected['grad_logits'])
  assert np.all(slopes.logits[:, :, 1] == 0)
  (same, _), fewer = gradient_of(loss_config)(
    output._replace(logits=allowed), unroll._replace(action=action - 1)
  )
  assert_close(loss, same)
  assert_close(np.delete(slopes.logits, 1, axis=-1), fewer.logits)


def test_a_forbidden_action_by_hand():
  output = types.AgentOutput(jnp.array([[[0.0, 0.0, -jnp.inf]]] * 2), jnp.zeros((2, 1)))
  unroll = types.Unroll(
    types.TimeStep(
      jnp.ones((2, 1), jnp.uint8), jnp.array([[0.0], [1.0]]), jnp.ones((2, 1)), None
    ),
    jnp.array([[0]]),
    jnp.array([[-0.69]]),
    None,
    None,
    None,
    None,
  )
  loss_config = config.Loss()
  (loss, metrics), slopes = gradient_of(loss_config)(output, unroll)
  ratio = min(1.0, 0.5 / np.exp(-0.69))
  by_hand = np.log(2) * ratio + 0.25 * ratio**2 - 0.01 * np.log(2)
  np.testing.assert_allclose(loss, by_hand, rtol=1e-6)
  np.testing.assert_allclose(metrics['entropy'], np.log(2), rtol=1e-6)
  # Taken all the same, it teaches the policy nothing, and harms nothing.
  (loss, _), slopes = gradient_of(loss_config)(
    output, unroll._replace(action=jnp.array([[2]]))
  )
  assert np.isfinite(loss)
  assert all(np.isfinite(x).all() for x in slopes)
