"""V-trace against the paper's explicit sum, and the ways it is called."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impala_jax import types, vtrace
from tests import numpy_reference as reference

SETTINGS = (
  {},
  {'rho_clip': 2.5, 'c_clip': 1.2, 'pg_rho_clip': 3.0, 'lambda_': 0.9},
  {'rho_clip': 1.0, 'c_clip': 0.5, 'pg_rho_clip': 0.7, 'lambda_': 0.3},
  {'lambda_': 0.0},
)
METHODS = ('scan', 'associative')


def make_inputs(seed, shape):
  """float32 inputs with off-policy ratios on both sides of every clip."""
  rng = np.random.default_rng(seed)
  values = rng.normal(size=(shape[0] + 1, *shape[1:])) * 3
  inputs = {
    'log_rhos': rng.normal(size=shape),
    'discounts': rng.uniform(0.8, 1, size=shape) * (rng.uniform(size=shape) > 0.1),
    'rewards': rng.normal(size=shape),
    'values': values[:-1],
    'next_values': values[1:],
  }
  return {k: x.astype(np.float32) for k, x in inputs.items()}


def expected(inputs, **kwargs):
  """The reference on each column of [T, B]."""
  columns = [
    reference.vtrace(
      inputs['log_rhos'][:, b],
      inputs['discounts'][:, b],
      inputs['rewards'][:, b],
      inputs['values'][:, b],
      inputs['next_values'][-1, b],
      **kwargs,
    )
    for b in range(inputs['rewards'].shape[1])
  ]
  return [np.stack(x, axis=1) for x in zip(*columns, strict=True)]


def assert_close(actual, desired):
  np.testing.assert_allclose(actual, desired, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('correction', types.CORRECTIONS)
@pytest.mark.parametrize('kwargs', SETTINGS)
def test_matches_the_papers_sum(kwargs, correction, method):
  for steps in (1, 13):
    inputs = make_inputs(steps, (steps, 3))
    out = vtrace.vtrace(**inputs, **kwargs, correction=correction, method=method)
    vs, advantages = expected(inputs, **kwargs, correction=correction)
    assert_close(out.vs, vs)
    assert_close(out.pg_advantages, advantages)
    assert_close(out.rhos, np.exp(inputs['log_rhos']))


@functools.cache
def _jitted(method):
  return jax.jit(functools.partial(vtrace.vtrace, method=method, rho_clip=2.0))


@settings(max_examples=50, deadline=None)
@given(
  seed=st.integers(0, 2**32 - 1),
  steps=st.sampled_from([1, 2, 3, 8, 21]),
  valid_share=st.floats(0, 1),
)
def test_the_methods_agree(seed, steps, valid_share):
  inputs = make_inputs(seed, (steps, 4))
  valid = np.random.default_rng(seed).uniform(size=(steps, 4)) < valid_share
  results = [_jitted(m)(**inputs, valid=valid) for m in types.VTRACE_METHODS]
  for other in results[1:]:
    jax.tree.map(assert_close, other, results[0])


def test_on_policy_targets_are_n_step_bellman():
  inputs = make_inputs(0, (10, 2))
  inputs['log_rhos'][:] = 0
  out = vtrace.vtrace(**inputs)
  target = inputs['next_values'][-1].astype(np.float64)
  for t in reversed(range(10)):
    target = inputs['rewards'][t] + inputs['discounts'][t] * target
    assert_close(out.vs[t], target)
    assert_close(out.pg_advantages[t], target - inputs['values'][t])


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('correction', types.CORRECTIONS)
@pytest.mark.parametrize('garbage', [np.nan, np.inf])
def test_a_cut_separates_its_sides(garbage, correction, method):
  """What lies on the other side of an invalid step, or in it, changes nothing."""
  inputs = make_inputs(3, (9, 2))
  call = functools.partial(vtrace.vtrace, correction=correction, method=method)
  valid = np.ones((9, 2), bool)
  valid[4] = False
  before = call(**{k: x[:4] for k, x in inputs.items()})
  after = call(**{k: x[5:] for k, x in inputs.items()})
  for x in inputs.values():
    x[4] = garbage
  whole = call(**inputs, valid=valid)
  jax.tree.map(lambda x, y: assert_close(x[:4], y), whole, before)
  jax.tree.map(lambda x, y: assert_close(x[5:], y), whole, after)
  np.testing.assert_array_equal(whole.pg_advantages[4], 0)
  np.testing.assert_array_equal(whole.rhos[4], 0)


def test_invalid_steps_keep_their_value():
  inputs = make_inputs(4, (5, 2))
  out = vtrace.vtrace(**inputs, valid=np.zeros((5, 2), bool))
  np.testing.assert_array_equal(out.vs, inputs['values'])


@pytest.mark.parametrize('method', METHODS)
def test_extreme_ratios_stay_finite(method):
  inputs = make_inputs(5, (6, 2))
  inputs['log_rhos'][:] = np.array([1e30, -1e30, np.inf, -np.inf, 500, -500])[:, None]
  out = vtrace.vtrace(**inputs, method=method, rho_clip=np.inf, pg_rho_clip=np.inf)
  for x in out:
    assert np.all(np.isfinite(x))
  assert_close(np.log(out.rhos[:, 0]), [20, -20, 20, -20, 20, -20])


@pytest.mark.parametrize('method', types.VTRACE_METHODS)
def test_jit_vmap_pmap_agree(method):
  shape = (7, 4, 2)
  inputs = make_inputs(6, shape)
  valid = np.random.default_rng(0).uniform(size=shape) < 0.8
  call = lambda valid, kw: vtrace.vtrace(**kw, valid=valid, method=method)
  plain = call(valid, inputs)
  jitted = jax.jit(call)(valid, inputs)
  vmapped = jax.vmap(call, in_axes=1, out_axes=1)(valid, inputs)
  move = lambda x: np.moveaxis(x, 1, 0)
  assert jax.local_device_count() == 4
  pmapped = jax.pmap(call)(move(valid), jax.tree.map(move, inputs))
  for other in (jitted, vmapped, jax.tree.map(move, pmapped)):
    jax.tree.map(assert_close, other, plain)


@pytest.mark.parametrize('method', types.VTRACE_METHODS)
def test_no_gradient_flows(method):
  inputs = make_inputs(7, (6, 2))

  def total(kw):
    out = vtrace.vtrace(**kw, method=method)
    return sum(jnp.sum(x) for x in out) + jnp.sum(kw['values'] ** 2) / 2

  gradient = jax.jit(jax.grad(total))(inputs)
  assert_close(gradient.pop('values'), inputs['values'])
  for x in gradient.values():
    np.testing.assert_array_equal(x, 0)


def test_low_precision_is_computed_in_float32():
  inputs = {k: jnp.asarray(x, jnp.bfloat16) for k, x in make_inputs(8, (9, 2)).items()}
  out = vtrace.vtrace(**inputs)
  rounded = {k: np.asarray(x, np.float32) for k, x in inputs.items()}
  assert out.vs.dtype == jnp.float32
  assert_close(out.vs, expected(rounded)[0])


@pytest.mark.parametrize(
  ('kwargs', 'words'),
  [
    ({'correction': 'v-trace'}, r"correction is 'v-trace'.*vtrace, one_step_is"),
    ({'method': 'loop'}, r"method is 'loop'.*auto, scan, associative"),
    ({'c_clip': 2.0}, r'c_clip is 2\.0.*rho_clip \(1\.0\)'),
    ({'pg_rho_clip': -1.0}, r'pg_rho_clip is -1\.0'),
    ({'lambda_': np.nan}, r'lambda_ is nan'),
    ({'lambda_': 1.5}, r'lambda_ is 1\.5: must lie in \[0, 1\]'),
    ({'rho_clip': np.inf, 'c_clip': np.inf}, r'c_clip is inf: .* at most 1e\+04 for 3'),
  ],
)
def test_refuses_impossible_settings(kwargs, words):
  with pytest.raises(ValueError, match=words):
    vtrace.vtrace(**make_inputs(0, (3, 2)), **kwargs)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('steps', [1, 6, 100])
def test_the_largest_weights_do_not_overflow(method, steps):
  inputs = make_inputs(1, (steps, 2))
  inputs['log_rhos'][:] = 50.0
  inputs['discounts'][:] = 1.0
  most = types.largest_trace_weight(steps)
  out = vtrace.vtrace(**inputs, method=method, rho_clip=np.inf, c_clip=most)
  for x in out:
    assert np.all(np.isfinite(x))
  with pytest.raises(ValueError, match=r'c_clip is .*overflow'):
    vtrace.vtrace(**make_inputs(1, (60, 2)), method=method, rho_clip=np.inf, c_clip=1.7)


def test_refuses_wrong_arrays():
  inputs = make_inputs(0, (3, 2))
  for wrong in (
    {'rewards': inputs['rewards'][:2]},
    {'rewards': np.ones((3, 2), np.int32)},
    {'valid': np.ones((3, 2), np.float32)},
    {'valid': np.ones((3,), bool)},
    {k: x[:0] for k, x in inputs.items()},
  ):
    with pytest.raises(AssertionError):
      vtrace.vtrace(**{**inputs, **wrong})
