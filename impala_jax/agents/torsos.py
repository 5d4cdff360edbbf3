"""What turns an observation into a vector: [N, *observation shape] -> [N, D].

Time is folded into N. On CPU a convolution's gradient inside a loop over time is
more than ten times slower. Images are NHWC. uint8 observations are divided by 255.
Parameters are float32, whatever the `dtype` of the computation.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from impala_jax import types
from impala_jax.agents import convolution

# The usual gain of orthogonal weights before a relu.
_RELU_INIT = nn.initializers.orthogonal(2**0.5)


def _to_float(x: types.Array, dtype: DTypeLike) -> types.Array:
  if x.dtype == jnp.uint8:
    return x.astype(dtype) / 255
  return x.astype(dtype)


def _check_image(name: str, x: types.Array, smallest: int = 1) -> None:
  if x.ndim != 4 or min(x.shape[1:3]) < smallest:
    raise ValueError(
      f'torso {name!r} needs images [H, W, C] with H and W at least {smallest}, but '
      f"the observation is {list(x.shape[1:])}: choose another torso ('mlp' takes "
      'any shape)'
    )


def _flatten(x: types.Array) -> types.Array:
  return x.reshape(x.shape[0], -1)


class Shallow(nn.Module):
  """Two convolutions: the shallow network of the IMPALA paper."""

  hidden: int = 256
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: types.Array) -> types.Array:
    _check_image('shallow', x, smallest=20)
    x = _to_float(x, self.dtype)
    for channels, kernel, stride in ((16, 8, 4), (32, 4, 2)):
      x = nn.relu(_conv(channels, kernel, stride, self.dtype)(x))
    return nn.relu(_linear(self.hidden, self.dtype)(_flatten(x)))


class Nature(nn.Module):
  """Three convolutions (Mnih et al. 2015), the usual Atari network."""

  hidden: int = 512
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: types.Array) -> types.Array:
    _check_image('nature', x, smallest=36)
    x = _to_float(x, self.dtype)
    for channels, kernel, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
      x = nn.relu(_conv(channels, kernel, stride, self.dtype)(x))
    return nn.relu(_linear(self.hidden, self.dtype)(_flatten(x)))


class Deep(nn.Module):
  """The residual network of the IMPALA paper: 15 convolutions in 3 sections."""

  hidden: int = 256
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: types.Array) -> types.Array:
    _check_image('deep', x)
    x = _to_float(x, self.dtype)
    for channels in (16, 32, 32):
      x = _conv3x3(channels, self.dtype)(x)
      x = convolution.max_pool(x)
      for _ in range(2):
        y = _conv3x3(channels, self.dtype)(nn.relu(x))
        x = x + _conv3x3(channels, self.dtype)(nn.relu(y))
    return nn.relu(_linear(self.hidden, self.dtype)(_flatten(nn.relu(x))))


class MLP(nn.Module):
  """Two linear layers, for vectors and small observations of any shape."""

  hidden: int = 256
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: types.Array) -> types.Array:
    x = _flatten(_to_float(x, self.dtype))
    for _ in range(2):
      x = nn.relu(_linear(self.hidden, self.dtype)(x))
    return x


def _conv(channels: int, kernel: int, stride: int, dtype: DTypeLike) -> nn.Module:
  return convolution.Conv(
    channels, kernel, stride, 'VALID', dtype=dtype, kernel_init=_RELU_INIT
  )


def _conv3x3(channels: int, dtype: DTypeLike) -> nn.Module:
  return convolution.Conv(channels, 3, dtype=dtype)


def _linear(units: int, dtype: DTypeLike) -> nn.Module:
  return nn.Dense(units, dtype=dtype, kernel_init=_RELU_INIT)


# By the names of `config.TORSOS`.
BY_NAME = {'shallow': Shallow, 'deep': Deep, 'nature': Nature, 'mlp': MLP}
