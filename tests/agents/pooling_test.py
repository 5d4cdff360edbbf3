"""Max-pooling by slices against XLA's own, values and gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from impala_jax.agents import pooling


def _xla(x):
  return nn.max_pool(x, (3, 3), (2, 2), 'SAME')


@pytest.mark.parametrize(
  ('n', 'height', 'width'), [(3, 1, 1), (16, 6, 5), (12, 7, 4), (2, 2, 9)]
)
@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
def test_equals_xla_with_many_ties(monkeypatch, backend, n, height, width):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  rng = np.random.default_rng(n)
  # Whole numbers, all negative: ties in most windows, and padding must not win.
  x = rng.integers(-4, -1, (n, height, width, 3)).astype(np.float32)
  weights = rng.normal(size=_xla(x).shape).astype(np.float32)

  def both(pool):
    loss = lambda x: (pool(x) * weights).sum()
    return jax.jit(pool)(x), jax.jit(jax.grad(loss))(x)

  for got, want in zip(both(pooling.max_pool), both(_xla), strict=True):
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_value_is_the_same_with_and_without_a_gradient():
  x = np.random.default_rng(0).normal(size=(2, 9, 8, 3)).astype(np.float32)
  value, _ = jax.vjp(pooling.max_pool, x)
  np.testing.assert_array_equal(value, pooling.max_pool(x))


def test_gradient_in_bfloat16():
  x = np.random.default_rng(0).normal(size=(1, 7, 6, 2))
  x = jnp.asarray(x, jnp.bfloat16)
  got = jax.grad(lambda x: pooling.max_pool(x).sum())(x)
  want = jax.grad(lambda x: _xla(x).sum())(x)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
