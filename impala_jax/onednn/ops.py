"""Convolution and max-pooling by oneDNN, with gradients, for float32 on CPU."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from impala_jax import types
from impala_jax.onednn import kernels, library
from impala_jax.onednn.kernels import Window


def convolution(
  x: types.Array,
  kernel: types.Array,
  bias: types.Array,
  strides: tuple[int, int],
  padding: str,
) -> types.Array:
  """Convolves images with a kernel and adds a bias.

  Args:
    x: float32 [N, H, W, C].
    kernel: float32 [h, w, C, D].
    bias: float32 [D].
    strides: of height and width.
    padding: 'SAME' or 'VALID'.

  Returns:
    float32 [N, H', W', D].
  """
  window = _window(x.shape, kernel.shape[3], kernel.shape[:2], strides, padding)
  return _convolution(window, x, kernel, bias)


def max_pool(x: types.Array) -> types.Array:
  """Pools windows of 3x3 with stride 2 and 'SAME' padding.

  Args:
    x: float32 [N, H, W, C].

  Returns:
    [N, ceil(H / 2), ceil(W / 2), C], NaN where a window has one, as XLA's. The gradient
    of a window goes to the first of its largest elements, row by row.
  """
  return _max_pool(_window(x.shape, x.shape[3], (3, 3), (2, 2), 'SAME'), x)


def _window(
  images: Sequence[int],
  channels: int,
  size: Sequence[int],
  strides: Sequence[int],
  padding: str,
) -> Window:
  pads = jax.lax.padtype_to_pads(images[1:3], size, strides, padding)
  top, left = ((int(before), int(after)) for before, after in pads)
  n, height, width, depth = images
  return Window(
    (n, height, width, depth),
    channels,
    (size[0], size[1]),
    (strides[0], strides[1]),
    (top, left),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolution(window, x, kernel, bias):
  (result,) = _call(kernels.convolution(window), [window.result], x, kernel, bias)
  return result


def _convolution_forward(window, x, kernel, bias):
  return _convolution(window, x, kernel, bias), (x, kernel)


def _convolution_backward(window, residuals, gradient):
  x, kernel = residuals
  (dx,) = _call(
    kernels.convolution_images_gradient(window), [window.images], kernel, gradient
  )
  dk, db = _call(
    kernels.convolution_kernel_gradient(window),
    [window.kernel, (window.channels,)],
    x,
    gradient,
  )
  return dx, dk, db


_convolution.defvjp(_convolution_forward, _convolution_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _max_pool(window, x):
  return _max_pool_forward(window, x)[0]


def _max_pool_forward(window, x):
  kernel, size = kernels.max_pool(window)
  where = jax.ShapeDtypeStruct((size,), jnp.uint8)
  result, where = _call(kernel, [window.result, where], x)
  # oneDNN passes over NaN. A sum finds out whether there is any in half of the time
  # that a look at each takes; it may be NaN without, and then nothing changes.
  suspicious = jnp.isnan(jnp.sum(x))
  result = jax.lax.cond(
    suspicious,
    functools.partial(_keep_nan, window),
    lambda result, x: result,
    result,
    x,
  )
  return result, where


def _keep_nan(window, result, x):
  (height, width), (down, right) = window.size, window.strides
  nan = jax.lax.reduce_window(
    jnp.isnan(x),
    False,
    jax.lax.bitwise_or,
    (1, height, width, 1),
    (1, down, right, 1),
    ((0, 0), *window.padding, (0, 0)),
  )
  return jnp.where(nan, jnp.nan, result)


def _max_pool_backward(window, where, gradient):
  kernel = kernels.max_pool_gradient(window)
  return tuple(_call(kernel, [window.images], where, gradient))


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _call(kernel, results, *inputs):
  """Calls a kernel; its scratch memory is XLA's, as further results that none uses."""
  outputs = [
    r if isinstance(r, jax.ShapeDtypeStruct) else jax.ShapeDtypeStruct(r, jnp.float32)
    for r in results
  ]
  outputs += [jax.ShapeDtypeStruct((size,), jnp.uint8) for size in kernel.scratch]
  call = jax.ffi.ffi_call(library.TARGET, outputs, vmap_method='sequential')
  return call(*inputs, program=np.int64(kernel.number))[: len(results)]
