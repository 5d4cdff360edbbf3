"""Catch: the smallest game that a pixel agent can fail at."""

import dm_env
import numpy as np
from dm_env import specs

from impala_jax.environments import registry

_CELL = 16  # Pixels of a cell in the picture.


class Catch(dm_env.Environment):
  """A ball falls one row a step; a paddle in the last row must be under it.

  The ball starts in a random column of the first row, the paddle in the middle.
  After `rows - 1` steps the ball is in the last row, and the reward is +1 where the
  paddle caught it, else -1; it is 0 before. Random play earns
  about 2 / columns - 1 on average, perfect play 1.

  Actions: 0 moves the paddle left, 1 leaves it, 2 moves it right.
  Observation: float32 [rows, columns], 1 where the ball or the paddle is, else 0.

  Raises:
    ValueError: fewer than 2 rows or 1 column.
  """

  def __init__(self, rows: int = 10, columns: int = 5, seed: int | None = None):
    if rows < 2 or columns < 1:
      raise ValueError(
        f'rows, columns are {rows}, {columns}: must be at least 2 and 1 respectively'
      )
    self._shape = (rows, columns)
    self._rng = np.random.default_rng(seed)
    self._ball_row = self._ball_column = self._paddle = 0
    self._over = True

  def reset(self) -> dm_env.TimeStep:
    self._ball_row = 0
    self._ball_column = int(self._rng.integers(self._shape[1]))
    self._paddle = self._shape[1] // 2
    self._over = False
    return dm_env.restart(self._observation())

  def step(self, action: int) -> dm_env.TimeStep:
    if self._over:
      return self.reset()
    if not 0 <= int(action) <= 2:
      raise ValueError(f'action is {action}: must be 0, 1 or 2')
    self._paddle = min(max(self._paddle + int(action) - 1, 0), self._shape[1] - 1)
    self._ball_row += 1
    self._over = self._ball_row == self._shape[0] - 1
    if not self._over:
      return dm_env.transition(reward=0.0, observation=self._observation())
    reward = 1.0 if self._paddle == self._ball_column else -1.0
    return dm_env.termination(reward=reward, observation=self._observation())

  def observation_spec(self) -> specs.BoundedArray:
    return specs.BoundedArray(self._shape, np.float32, 0, 1, 'board')

  def action_spec(self) -> specs.DiscreteArray:
    return specs.DiscreteArray(3, np.int32, 'action')

  def frame(self) -> np.ndarray:
    """The board as a picture, uint8 [16 rows, 16 columns, 3]."""
    grey = (255 * self._observation()).astype(np.uint8)
    return np.kron(grey, np.ones((_CELL, _CELL), np.uint8))[..., None].repeat(3, -1)

  def _observation(self) -> np.ndarray:
    board = np.zeros(self._shape, np.float32)
    board[self._ball_row, self._ball_column] = 1
    board[-1, self._paddle] = 1
    return board


SUITE = registry.from_maker(lambda level, seed: Catch(seed=seed), ['catch'])
