"""Convolutions and pooling: oneDNN's against XLA's, and which of them is taken."""

import functools
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from impala_jax.agents import convolution, torsos
from impala_jax.onednn import library, ops

needs_onednn = pytest.mark.skipif(
  not library.available(), reason='oneDNN is not installed here'
)


def _random(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _by_definition(x, kernel, bias, stride, padding):
  """Sums window by window, in float64."""
  size = kernel.shape[0]
  pads = jax.lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), padding)
  x = np.pad(x.astype(np.float64), ((0, 0), *pads, (0, 0)))
  height, width = ((length - size) // stride + 1 for length in x.shape[1:3])
  y = np.zeros((len(x), height, width, kernel.shape[3]))
  for i in range(height):
    for j in range(width):
      window = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
      y[:, i, j] = np.tensordot(window, kernel.astype(np.float64), 3)
  return y + bias


# The layers of the networks, and shapes that none of them has.
LAYERS = [
  ((2, 84, 84, 4), 16, 3, 1, 'SAME'),
  ((3, 21, 21, 32), 32, 3, 1, 'SAME'),
  ((1, 11, 9, 5), 7, 3, 1, 'SAME'),
  ((2, 20, 20, 32), 64, 4, 2, 'VALID'),
  ((1, 36, 40, 1), 32, 8, 4, 'VALID'),
  ((2, 10, 7, 3), 6, 4, 2, 'SAME'),
]


@needs_onednn
@pytest.mark.parametrize(('shape', 'channels', 'size', 'stride', 'padding'), LAYERS)
def test_convolution_is_that_of_the_definition(shape, channels, size, stride, padding):
  x, bias = _random(0, *shape), _random(1, channels)
  kernel = _random(2, size, size, shape[3], channels)
  got = jax.jit(ops.convolution, static_argnums=(3, 4))(
    x, kernel, bias, (stride, stride), padding
  )
  want = _by_definition(x, kernel, bias, stride, padding)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize(('shape', 'channels', 'size', 'stride', 'padding'), LAYERS)
def test_gradients_are_those_of_xla(shape, channels, size, stride, padding):
  x, bias = _random(0, *shape), _random(1, channels)
  kernel = _random(2, size, size, shape[3], channels)
  strides = (stride, stride)

  def xla(x, kernel, bias, strides, padding):
    layout = ('NHWC', 'HWIO', 'NHWC')
    return bias + jax.lax.conv_general_dilated(
      x, kernel, strides, padding, dimension_numbers=layout
    )

  weights = _random(3, *xla(x, kernel, bias, strides, padding).shape)

  def gradients(convolve):
    loss = lambda *args: (convolve(*args, strides, padding) * weights).sum()
    return jax.jit(jax.grad(loss, (0, 1, 2)))(x, kernel, bias)

  for got, want in zip(gradients(ops.convolution), gradients(xla), strict=True):
    scale = abs(want).max()
    np.testing.assert_allclose(got / scale, want / scale, atol=2e-5)


@needs_onednn
@pytest.mark.parametrize(
  ('n', 'height', 'width', 'channels'),
  [(2, 84, 84, 16), (3, 21, 21, 32), (1, 6, 5, 3), (2, 2, 9, 17), (4, 1, 1, 8)],
)
def test_pooling_is_that_of_xla_with_many_ties(n, height, width, channels):
  rng = np.random.default_rng(n)
  # Whole numbers, all negative: ties in most windows, and padding must not win.
  x = rng.integers(-4, -1, (n, height, width, channels)).astype(np.float32)
  xla = lambda x: nn.max_pool(x, (3, 3), (2, 2), 'SAME')
  weights = rng.normal(size=xla(x).shape).astype(np.float32)

  def both(pool):
    loss = lambda x: (pool(x) * weights).sum()
    return jax.jit(pool)(x), jax.jit(jax.grad(loss))(x)

  for got, want in zip(both(ops.max_pool), both(xla), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-6)


@needs_onednn
def test_pooling_keeps_nan_as_xla_does_and_infinities():
  x = np.random.default_rng(0).normal(size=(3, 9, 8, 4)).astype(np.float32)
  x[0, 3, 4, 1] = x[1, 0, 0, 0] = x[2, 8, 7, 3] = np.nan
  x[1, 5, 5, 2], x[2, 2, 2, 0] = np.inf, -np.inf
  want = nn.max_pool(x, (3, 3), (2, 2), 'SAME')
  assert 3 <= np.isnan(want).sum() < 20
  np.testing.assert_array_equal(jax.jit(ops.max_pool)(x), want)
  value, _ = jax.vjp(ops.max_pool, x)
  np.testing.assert_array_equal(value, want)
  # A sum of infinities is NaN, though none is there.
  x = np.where(np.isnan(x), 0.0, x).astype(np.float32)
  want = nn.max_pool(x, (3, 3), (2, 2), 'SAME')
  np.testing.assert_array_equal(ops.max_pool(x), want)


def test_vmap_and_several_devices_at_once():
  kernel, bias = _random(1, 3, 3, 4, 8), _random(2, 8)
  x = _random(0, 2 * jax.local_device_count(), 3, 12, 10, 4)
  convolve = lambda x: ops.convolution(x, kernel, bias, (1, 1), 'SAME')
  want = np.stack([convolve(one) for one in x])
  np.testing.assert_allclose(jax.vmap(convolve)(x), want, atol=1e-5)
  shards = x.reshape(jax.local_device_count(), -1, *x.shape[2:])
  got = jax.pmap(convolve)(shards)
  np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-5)


@needs_onednn
def test_many_threads_at_once_get_their_own_results():
  import concurrent.futures

  kernel, bias = _random(1, 3, 3, 4, 8), _random(2, 8)
  convolve = jax.jit(lambda x: ops.convolution(x, kernel, bias, (1, 1), 'SAME'))
  inputs = [_random(seed, 4, 20, 20, 4) for seed in range(8)]
  want = [np.asarray(convolve(x)) for x in inputs]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for _ in range(10):
      for got, expected in zip(pool.map(convolve, inputs), want, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_parameters_are_those_of_flax():
  x = jnp.zeros((1, 9, 9, 3))
  ours = convolution.Conv(5, 3, padding='VALID')
  theirs = nn.Conv(5, (3, 3), padding='VALID')
  params = ours.init(jax.random.key(0), x)
  same = theirs.init(jax.random.key(0), x)
  jax.tree.map(np.testing.assert_array_equal, params, same)
  x = jnp.asarray(_random(0, 2, 9, 9, 3))
  np.testing.assert_allclose(ours.apply(params, x), theirs.apply(same, x), atol=1e-5)


@pytest.mark.parametrize('name', ['shallow', 'nature', 'deep'])
def test_networks_agree_whoever_convolves(monkeypatch, name):
  torso = torsos.BY_NAME[name](hidden=16)
  x = np.random.default_rng(0).integers(0, 255, (3, 44, 40, 4)).astype(np.uint8)
  params = torso.init(jax.random.key(0), x)

  def gradient(there):
    monkeypatch.setattr(library, 'available', lambda: there)
    loss = lambda p: (torso.apply(p, x) ** 2).sum()
    return jax.jit(jax.value_and_grad(loss))(params)

  ways = [False, True] if library.available() else [False, False]
  for a, b in zip(*map(jax.tree.leaves, map(gradient, ways)), strict=True):
    scale = max(abs(b).max(), 1e-3)
    np.testing.assert_allclose(a / scale, b / scale, atol=1e-4)


@pytest.mark.parametrize(
  ('backend', 'dtype', 'there', 'taken'),
  [
    ('cpu', jnp.float32, True, 'ffi_call'),
    ('cpu', jnp.float32, False, 'conv_general_dilated'),
    ('cpu', jnp.bfloat16, True, 'conv_general_dilated'),
    ('gpu', jnp.float32, True, 'conv_general_dilated'),
  ],
)
def test_which_is_taken(monkeypatch, backend, dtype, there, taken):
  if taken == 'ffi_call' and not library.available():
    pytest.skip('oneDNN is not installed here')
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(library, 'available', lambda: there)
  layer = convolution.Conv(8, 3, dtype=dtype)
  x = jnp.zeros((1, 8, 8, 8), dtype)
  program = str(
    jax.make_jaxpr(functools.partial(layer.init_with_output, jax.random.key(0)))(x)
  )
  assert taken in program


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
def test_the_gradient_of_pooling_needs_no_scatter(monkeypatch, backend):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  gradient = jax.grad(lambda x: convolution.max_pool(x).sum())
  program = str(jax.make_jaxpr(gradient)(jnp.zeros((1, 6, 6, 1))))
  assert 'scatter' not in program


@pytest.mark.parametrize(
  ('place', 'words'),
  [('off', "IMPALA_JAX_ONEDNN is 'off'"), ('/no/such/file', '/no/such/file cannot be')],
)
def test_without_it_xla_is_used_and_the_log_says_why(place, words):
  script = (
    'import logging; logging.basicConfig(level=logging.INFO)\n'
    'from impala_jax.onednn import library\n'
    'print(library.available())'
  )
  done = subprocess.run(
    [sys.executable, '-c', script],
    env={**os.environ, library.VARIABLE: place},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.stdout == 'False\n', done.stderr
  assert 'convolutions on CPU by XLA' in done.stderr
  if library.available() or place == 'off':
    assert words in done.stderr


@needs_onednn
def test_a_program_that_was_not_prepared_fails_the_computation():
  call = jax.ffi.ffi_call(library.TARGET, jax.ShapeDtypeStruct((2,), np.float32))
  with pytest.raises(Exception, match='oneDNN: there is no program 42'):
    jax.block_until_ready(jax.jit(lambda x: call(x, program=np.int64(42)))(np.zeros(2)))


@needs_onednn
def test_a_computation_under_way_at_the_end_disturbs_nothing():
  script = (
    'import jax, jax.numpy as jnp\n'
    'from impala_jax.onednn import ops\n'
    'kernel, bias = jnp.ones((3, 3, 8, 8)), jnp.ones(8)\n'
    'def work(x):\n'
    '  for _ in range(20): x = ops.convolution(x, kernel, bias, (1, 1), "SAME")\n'
    '  return x\n'
    'work = jax.jit(work)\n'
    'x = jnp.ones((16, 40, 40, 8))\n'
    'work(x).block_until_ready()\n'
    'kept = [work(x) for _ in range(3)]\n'
    'raise SystemExit(7)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 7, done.stderr
