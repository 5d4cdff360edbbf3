"""Pictures made smaller, fast enough for every step of an engine."""

import math
from collections.abc import Sequence

import numpy as np

_MOST = (2**16 - 1 - 128) // 255  # Pixels of a sum, with what rounds it.


class AreaAverage:
  """Reduces pictures: each pixel is the mean of the area that it covers.

  Args:
    source: rows, columns of the given pictures.
    target: rows, columns of the reduced ones, not larger.

  Raises:
    ValueError: sums would not fit in 16 bits. In each direction the smallest blocks of
      given pixels that make whole reduced ones are of at most 257; so are all of
      pictures of at most 257 by 257.
  """

  def __init__(self, source: tuple[int, int], target: tuple[int, int]):
    self._rows = _taps(source[0], target[0])
    self._columns = _taps(source[1], target[1])
    # Kept, for large arrays are slow to allocate.
    self._wide = np.empty((*source, 4), np.uint16)
    self._shorter = np.empty((target[0], source[1], 4), np.uint16)
    self._reduced = np.empty((*target, 4), np.uint16)

  def __call__(self, screen: np.ndarray) -> np.ndarray:
    """uint8 [rows, columns, 4] -> uint8 [rows, columns, 3] without the last channel.

    Rounded to the nearest in each direction.
    """
    self._wide[...] = screen
    # The four channels of a pixel lie in 64 bits, 16 for each: first whole rows are
    # added at once, then whole pixels.
    rows, columns = self._shorter.shape[:2]
    _reduce(self._wide.reshape(len(screen), -1), self._shorter, *self._rows)
    pixels = self._shorter.view(np.uint64).reshape(rows * columns, 1)
    _reduce(pixels, self._reduced, *self._columns)
    narrow = self._reduced.astype(np.uint8)
    out = np.empty((*narrow.shape[:2], 3), np.uint8)
    for channel in range(3):
      out[..., channel] = narrow[..., channel]
    return out


def _taps(given: int, wanted: int) -> tuple[int, list[list[tuple[int, int]]]]:
  """How `wanted` cells are made of `given` ones.

  Returns:
    The number of given cells in a block, and for each wanted cell of a block its
    (given cell, weight); weights of one cell sum to the first number.
  """
  common = math.gcd(given, wanted)
  p, q = given // common, wanted // common
  if p > _MOST:
    raise ValueError(f'{given} to {wanted} pixels: blocks of {p}, at most {_MOST}')
  # Each given cell is q units long, each wanted one p.
  cells = [
    [
      (k, min((j + 1) * p, (k + 1) * q) - max(j * p, k * q))
      for k in range(j * p // q, -(-(j + 1) * p // q))
    ]
    for j in range(q)
  ]
  return p, cells


def _reduce(
  lanes: np.ndarray,
  means: np.ndarray,
  block: int,
  cells: Sequence[Sequence[tuple[int, int]]],
) -> None:
  """Writes weighted means along the first axis of `lanes` [n, m] to `means`.

  The lanes hold one or four numbers below 256; their weighted sums fit in 16 bits.
  """
  blocks = lanes.reshape(-1, block, lanes.shape[1])
  sums = means.view(lanes.dtype).reshape(len(blocks), len(cells), lanes.shape[1])
  for j, ((first, weight), *others) in enumerate(cells):
    total = sums[:, j]
    np.multiply(blocks[:, first], weight, out=total)
    for k, weight in others:
      total += blocks[:, k] if weight == 1 else blocks[:, k] * weight
  means += block // 2
  means //= block
