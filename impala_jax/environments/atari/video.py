"""An Atari environment that is filmed while it is played."""

from typing import Any

import numpy as np

from impala_jax.environments import base
from impala_jax.environments.atari import environment as atari


class AtariVideo:
  """One environment of a game, with its RGB picture beside the agent's frames.

  ale-py delivers grey frames or RGB frames. So a second engine with RGB frames
  plays along: with the same seed and actions both go through the same states, and
  each step checks that they did.

  Args:
    game: name as `atari_games.games` lists it.
    **settings: those of `atari.AtariVector`, without `num_envs`.
  """

  num_envs = 1

  def __init__(self, game: str, **settings: Any):
    self._grey = atari.AtariVector(game, 1, **settings)
    settings['frame_shape'] = (210, 160, 3)
    self._rgb = atari.AtariVector(game, 1, **settings)
    self.spec = self._grey.spec
    self.task_ids = self._grey.task_ids
    self._frame: np.ndarray | None = None

  def reset(self, seed: int) -> None:
    self._grey.reset(seed)
    self._rgb.reset(seed)

  def send(self, env_ids: np.ndarray, actions: np.ndarray) -> None:
    self._grey.send(env_ids, actions)
    self._rgb.send(env_ids, actions)

  def recv(self, timeout: float) -> base.Ready:
    ready, film = self._grey.recv(timeout), self._rgb.recv(timeout)
    for name in ('step_type', 'reward', 'discount'):
      seen, filmed = (getattr(x.timestep, name)[0] for x in (ready, film))
      if seen != filmed:
        raise RuntimeError(
          f'the filmed game left the played one: {name} is {filmed}, expected {seen}'
        )
    self._frame = film.timestep.observation[0]
    return ready

  def frame(self) -> np.ndarray:
    """The picture of the last time step, uint8 [210, 160, 3], not to be changed."""
    if self._frame is None:
      raise RuntimeError('there is no picture before the first recv')
    return self._frame

  def close(self) -> None:
    self._grey.close()
    self._rgb.close()
