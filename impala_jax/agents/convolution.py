"""Convolutions and max-pooling of images: on CPU oneDNN's where it is, else XLA's.

On CPU, XLA's convolutions reach a third of what the processor can do, their gradients
less. The extra `onednn` and a C compiler at the installation bring oneDNN's.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from impala_jax import types
from impala_jax.agents import pooling
from impala_jax.onednn import library, ops


class Conv(nn.Module):
  """A convolution with a bias; its parameters are those of `flax.linen.Conv`.

  Attributes:
    channels: of the result.
    size: height and width of the kernel.
    stride: of both.
    padding: 'SAME' or 'VALID'.
    dtype: of the computation and the result.
    kernel_init: initialiser of the kernel; the bias starts at 0.
  """

  channels: int
  size: int
  stride: int = 1
  padding: str = 'SAME'
  dtype: DTypeLike = jnp.float32
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: types.Array) -> types.Array:
    """[N, H, W, C] -> [N, H', W', channels]."""
    shape = (self.size, self.size, x.shape[-1], self.channels)
    kernel = self.param('kernel', self.kernel_init, shape)
    bias = self.param('bias', nn.initializers.zeros, (self.channels,))
    x, kernel, bias = (array.astype(self.dtype) for array in (x, kernel, bias))
    strides = (self.stride, self.stride)
    if _by_onednn(x):
      return ops.convolution(x, kernel, bias, strides, self.padding)
    layout = ('NHWC', 'HWIO', 'NHWC')
    y = jax.lax.conv_general_dilated(
      x, kernel, strides, self.padding, dimension_numbers=layout
    )
    return y + bias


def max_pool(x: types.Array) -> types.Array:
  """Pools windows of 3x3 with stride 2 and 'SAME' padding.

  Args:
    x: [N, H, W, C], floating.

  Returns:
    [N, ceil(H / 2), ceil(W / 2), C]. The gradient of a window goes to the first of
    its largest elements, row by row, on every device.
  """
  # Decided at trace time; all ways give the same numbers.
  return ops.max_pool(x) if _by_onednn(x) else pooling.max_pool(x)


def _by_onednn(x: types.Array) -> bool:
  return (
    jax.default_backend() == 'cpu' and x.dtype == jnp.float32 and library.available()
  )
