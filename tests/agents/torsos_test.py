"""The torsos against slow NumPy convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from impala_jax import config
from impala_jax.agents import torsos


def _conv(x, p, stride=1, same=False):
  kernel, bias = np.asarray(p['kernel'], np.float64), np.asarray(p['bias'])
  kh, kw = kernel.shape[:2]
  if same:
    x = np.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))
  n, height, width, _ = x.shape
  rows, columns = (height - kh) // stride + 1, (width - kw) // stride + 1
  out = np.zeros((n, rows, columns, kernel.shape[-1]))
  for i in range(rows):
    for j in range(columns):
      patch = x[:, i * stride : i * stride + kh, j * stride : j * stride + kw]
      out[:, i, j] = np.einsum('nhwc,hwcd->nd', patch, kernel)
  return out + bias


def _max_pool(x):
  """3x3, stride 2, as many rows before as after or one fewer (TensorFlow's SAME)."""
  n, height, width, c = x.shape
  rows, columns = -(-height // 2), -(-width // 2)
  top = ((rows - 1) * 2 + 3 - height) // 2
  left = ((columns - 1) * 2 + 3 - width) // 2
  out = np.zeros((n, rows, columns, c))
  for i in range(rows):
    for j in range(columns):
      y, z = i * 2 - top, j * 2 - left
      window = x[:, max(y, 0) : y + 3, max(z, 0) : z + 3]
      out[:, i, j] = window.max((1, 2))
  return out


def _linear(x, p):
  return x.reshape(len(x), -1) @ np.asarray(p['kernel'], np.float64) + p['bias']


def _relu(x):
  return np.maximum(x, 0)


def _slow(name, params, x):
  x = x.astype(np.float64) / (255 if x.dtype == np.uint8 else 1)
  if name == 'mlp':
    return _relu(_linear(_relu(_linear(x, params['Dense_0'])), params['Dense_1']))
  if name == 'deep':
    convs = iter(params[f'Conv_{i}'] for i in range(15))
    for _ in range(3):
      x = _max_pool(_conv(x, next(convs), same=True))
      for _ in range(2):
        y = _conv(_relu(x), next(convs), same=True)
        x = x + _conv(_relu(y), next(convs), same=True)
    x = _relu(x)
  else:
    strides = {'shallow': (4, 2), 'nature': (4, 2, 1)}[name]
    for i, stride in enumerate(strides):
      x = _relu(_conv(x, params[f'Conv_{i}'], stride))
  return _relu(_linear(x, params['Dense_0']))


def _case(name, dtype=jnp.float32, shape=(40, 37, 2)):
  module = torsos.BY_NAME[name](hidden=24, dtype=dtype)
  x = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
  variables = jax.jit(module.init)(jax.random.key(1), x)
  # No bias may stay zero: it would hide.
  noise = np.random.default_rng(2)
  add = lambda p: p + 0.05 * noise.normal(size=p.shape).astype(np.float32)
  return module, jax.tree.map(add, variables), x


@pytest.mark.parametrize('name', torsos.BY_NAME)
def test_equals_the_formula(name):
  module, variables, x = _case(name)
  got = jax.jit(module.apply)(variables, x)
  want = _slow(name, variables['params'], x)
  assert got.shape == (2, 24)
  assert (want > 0).mean() > 0.2
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  # Floats are taken as they are.
  scaled = jax.jit(module.apply)(variables, x.astype(np.float32) / 255)
  np.testing.assert_allclose(scaled, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', torsos.BY_NAME)
def test_bfloat16(name):
  module, variables, x = _case(name, jnp.bfloat16)
  got = jax.jit(module.apply)(variables, x)
  assert got.dtype == jnp.bfloat16
  for p in jax.tree.leaves(jax.eval_shape(module.init, jax.random.key(0), x)):
    assert p.dtype == np.float32
  want = _slow(name, variables['params'], x)
  np.testing.assert_allclose(got.astype(np.float32), want, atol=0.05 * want.max())


def test_every_name_of_the_configuration():
  assert set(torsos.BY_NAME) == set(config.TORSOS)


@pytest.mark.parametrize(('name', 'smallest'), [('shallow', 20), ('nature', 36)])
def test_smallest_image(name, smallest):
  module = torsos.BY_NAME[name](4)
  init = lambda *args: jax.eval_shape(module.init, *args)
  size = (1, smallest, smallest, 1)
  assert init(jax.random.key(0), np.zeros(size, np.uint8))
  with pytest.raises(ValueError, match=f'{name}.*at least {smallest}'):
    init(jax.random.key(0), np.zeros((1, smallest, smallest - 1, 1), np.uint8))
