"""The LSTM against one written step by step from its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from impala_jax.agents import lstm


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def _slow_lstm(params, inputs, state, reset, skip):
  w, u = np.asarray(params['input']['kernel']), np.asarray(params['recurrent'])
  bias = np.asarray(params['input']['bias'])
  n = u.shape[0]
  out = np.zeros((*inputs.shape[:2], n))
  last = np.zeros((2, inputs.shape[1], n))
  for b in range(inputs.shape[1]):
    h, c = state[0][b], state[1][b]
    for t in range(inputs.shape[0]):
      if reset[t, b]:
        h, c = np.zeros(n), np.zeros(n)
      if not skip[t, b]:
        z = inputs[t, b] @ w + h @ u + bias
        i, f = _sigmoid(z[:n]), _sigmoid(z[n : 2 * n] + 1)
        g, o = np.tanh(z[2 * n : 3 * n]), _sigmoid(z[3 * n :])
        c = f * c + i * g
        h = o * np.tanh(c)
      out[t, b] = h
    last[0, b], last[1, b] = h, c
  return out, last


def _case(seed=0, t=9, b=4, d=6, units=5):
  rng = np.random.default_rng(seed)
  module = lstm.LSTM(units)
  inputs = rng.normal(size=(t, b, d)).astype(np.float32)
  state = tuple(rng.normal(size=(b, units)).astype(np.float32) for _ in range(2))
  variables = module.init(jax.random.key(seed), inputs, state)
  # Nothing may hide behind a bias of zero.
  noise = lambda x: x + rng.normal(size=x.shape).astype(np.float32) * 0.3
  variables = jax.tree.map(noise, variables)
  return module, variables, inputs, state, rng


def test_equals_the_formula_with_resets_and_skips():
  module, variables, inputs, state, rng = _case()
  reset, skip = rng.random((2, 9, 4)) < 0.3
  assert (reset & skip).any()
  got, got_state = module.apply(variables, inputs, state, reset, skip)
  want, want_state = _slow_lstm(variables['params'], inputs, state, reset, skip)
  np.testing.assert_allclose(got, want, atol=1e-5)
  np.testing.assert_allclose(np.stack(got_state), want_state, atol=1e-5)


def _by_steps(params, inputs, state, reset, skip):
  """The formula in plain JAX, for its automatic gradient."""
  h, c = state
  outputs = []
  for t in range(len(inputs)):
    h, c = (jnp.where(reset[t][:, None], 0.0, s) for s in (h, c))
    z = inputs[t] @ params['input']['kernel'] + params['input']['bias']
    i, f, g, o = jnp.split(z + h @ params['recurrent'], 4, axis=-1)
    new_c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    new_h = jax.nn.sigmoid(o) * jnp.tanh(new_c)
    h = jnp.where(skip[t][:, None], h, new_h)
    c = jnp.where(skip[t][:, None], c, new_c)
    outputs.append(h)
  return jnp.stack(outputs), (h, c)


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
@pytest.mark.parametrize('masks', ['none', 'reset', 'skip', 'both'])
def test_gradients_are_those_of_the_formula(monkeypatch, masks, backend):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  module, variables, inputs, state, rng = _case(3)
  none = np.zeros((9, 4), bool)
  reset, skip = rng.random((2, 9, 4)) < 0.3
  reset, skip = (
    m if masks in (name, 'both') else none
    for name, m in (('reset', reset), ('skip', skip))
  )
  weights = [rng.normal(size=s).astype(np.float32) for s in ((9, 4, 5), (2, 4, 5))]

  def loss(function):
    def total(variables, inputs, state):
      outputs, last = function(variables, inputs, state)
      return (weights[0] * outputs).sum() + (weights[1] * jnp.stack(last)).sum()

    return jax.grad(total, argnums=(0, 1, 2))(variables, inputs, state)

  given = [m if m.any() else None for m in (reset, skip)]
  got = loss(lambda v, x, s: module.apply(v, x, s, *given))
  want = loss(lambda v, x, s: _by_steps(v['params'], x, s, reset, skip))
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.abs(b).max() > 0.1
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


def test_without_masks_nothing_is_reset_or_skipped():
  module, variables, inputs, state, _ = _case(1)
  none = np.zeros((9, 4), bool)
  got, got_state = module.apply(variables, inputs, state)
  want, want_state = _slow_lstm(variables['params'], inputs, state, none, none)
  np.testing.assert_allclose(got, want, atol=1e-5)
  np.testing.assert_allclose(np.stack(got_state), want_state, atol=1e-5)


def test_reset_stops_values_and_gradients_even_of_nan():
  module, variables, inputs, state, _ = _case(2)
  reset = np.zeros((9, 4), bool)
  reset[4] = True

  def late(state, early):
    x = np.concatenate([np.asarray(inputs[:4]), inputs[4:]])
    x = jax.numpy.asarray(x).at[:4].set(early)
    return module.apply(variables, x, state, reset)[0][4:].sum()

  gradients = jax.grad(late, argnums=(0, 1))(state, inputs[:4])
  for gradient in jax.tree.leaves(gradients):
    np.testing.assert_array_equal(gradient, 0)
  nan = jax.tree.map(lambda x: np.full_like(x, np.nan), state)
  reset[0] = True
  outputs, _ = module.apply(variables, inputs, nan, reset)
  assert np.isfinite(outputs).all()
