"""Max-pooling 3x3 with stride 2, with a gradient that needs no scatter.

XLA's own gradient of a pooling (select-and-scatter) is a scalar loop on CPU: this one
takes 18 % (JAX 0.7.1) to 36 % (0.10.2) off the time of the deep network's gradient on
one core. For a GPU, XLA makes arrays of indices and atomic additions of its own, which
move 43 GB in an update of 128 unrolls of 100 steps, where this one moves 6
(`experiments/benchmarks/gpu_program.py`).
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from impala_jax import types


@jax.custom_vjp
def max_pool(x: types.Array) -> types.Array:
  """Pools windows of 3x3 with stride 2 and 'SAME' padding.

  Args:
    x: [N, H, W, C], floating.

  Returns:
    [N, ceil(H / 2), ceil(W / 2), C]: the maximum of 9 strided slices. The gradient of
    a window goes to the first of its largest elements, row by row.
  """
  return functools.reduce(jnp.maximum, _slices(x))


def _forward(x):
  if _on_cpu():
    largest, where = jax.tree.map(_join, jax.lax.map(_pool, _split(x)))
  else:
    largest, where = _pool(x)
  # Only the sizes of the empty array matter: residuals must be arrays.
  return largest, (where, jnp.zeros((*x.shape[1:3], 0)))


def _backward(residuals, gradient):
  where, sizes = residuals
  height, width = sizes.shape[:2]
  if not _on_cpu():
    return (_unpool_in_one(where, gradient, height, width),)

  def unpool(chunk):
    parts = _parts(*chunk)
    columns = [_spread(parts[j::3], 1, height) for j in range(3)]
    return _spread(columns, 2, width)

  return (_join(jax.lax.map(unpool, (_split(where), _split(gradient)))),)


max_pool.defvjp(_forward, _backward)


def _on_cpu() -> bool:
  """Decided at trace time; the ways differ in rounding alone."""
  return jax.default_backend() == 'cpu'


def _pool(x: types.Array) -> tuple[types.Array, types.Array]:
  """The maxima, and uint8 places in their windows."""
  largest, *others = _slices(x)
  where = jnp.zeros(largest.shape, jnp.uint8)
  for i, other in enumerate(others, 1):
    where = jnp.where(other > largest, jnp.uint8(i), where)
    largest = jnp.maximum(largest, other)
  return largest, where


def _parts(where: types.Array, gradient: types.Array) -> list[types.Array]:
  """What each place of the windows gets."""
  return [jnp.where(where == i, gradient, 0) for i in range(9)]


def _unpool_in_one(
  where: types.Array, gradient: types.Array, height: int, width: int
) -> types.Array:
  """A sum that XLA makes one kernel of on a GPU; on CPU it takes 1.4 times as long."""

  def edges(size: int, windows: int, place: int) -> tuple[int, int, int]:
    before = place - _padding(size)[0]
    return before, size - before - (2 * windows - 1), 1

  _, rows, columns, _ = where.shape
  spread = []
  for k, part in enumerate(_parts(where, gradient)):
    row, column = divmod(k, 3)
    padding = edges(height, rows, row), edges(width, columns, column)
    zero = jnp.zeros((), part.dtype)
    spread.append(jax.lax.pad(part, zero, ((0, 0, 0), *padding, (0, 0, 0))))
  return functools.reduce(jnp.add, spread)


def _split(x: types.Array) -> types.Array:
  """[N, ...] -> [chunks, N / chunks, ...].

  The loop over the chunks keeps XLA from fusing all of the pooling into its
  neighbours, which would compute it again in each of them; and a chunk is more
  likely to fit in the cache.
  """
  chunks = math.gcd(len(x), 8)
  return x.reshape(chunks, len(x) // chunks, *x.shape[1:])


def _join(x: types.Array) -> types.Array:
  return x.reshape(-1, *x.shape[2:])


def _padding(size: int) -> tuple[int, int]:
  """Before and after; together with `size` always 2 * ceil(size / 2) + 1."""
  return (0, 1) if size % 2 == 0 else (1, 1)


def _slices(x: types.Array) -> list[types.Array]:
  """The elements of all windows, by their place in the window, row by row."""
  n, height, width, c = x.shape
  rows, columns = -(-height // 2), -(-width // 2)
  padding = ((0, 0), _padding(height), _padding(width), (0, 0))
  x = jnp.pad(x, padding, constant_values=-jnp.inf)
  return [
    jax.lax.slice(
      x, (0, i, j, 0), (n, i + 2 * rows - 1, j + 2 * columns - 1, c), (1, 2, 2, 1)
    )
    for i in range(3)
    for j in range(3)
  ]


def _spread(parts: Sequence[types.Array], axis: int, size: int) -> types.Array:
  """Adds windows back to where they came from along one axis: no scatter needed.

  Args:
    parts: what the first, second and third element of each window gets.
    axis: along which windows of 3 with stride 2 were taken.
    size: of the axis before pooling.
  """
  first, second, third = parts

  def shift(x, by):
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (by, -by, 0)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)

  if size % 2 == 0:  # Windows begin at elements 0, 2, 4 ...
    pair = (first + shift(third, 1), second)
  else:  # ... and at -1, 1, 3 ...
    pair = (second, third + shift(first, -1))
  shape = list(first.shape)
  shape[axis] *= 2
  return jax.lax.slice_in_dim(
    jnp.stack(pair, axis + 1).reshape(shape), 0, size, axis=axis
  )
