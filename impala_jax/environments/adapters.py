"""Any `gymnasium.Env` with discrete actions as a `dm_env.Environment`."""

from typing import Any

import dm_env
import numpy as np
from dm_env import specs


class GymnasiumEnvironment(dm_env.Environment):
  """Plays `env`: `terminated` becomes discount 0, `truncated` LAST with discount 1.

  Observations may be Box, Discrete, MultiBinary or MultiDiscrete, or a Dict of
  these; of discrete ones the value is given, int32. Actions count from 0, whatever
  the `start` of the environment's own action space.

  Args:
    env: a `gymnasium.Env`, not vectorised.
    seed: given to the first `reset` of `env`.

  Raises:
    ValueError: the action space or a part of the observation space is of a kind
      that is not supported; the text names it.
  """

  def __init__(self, env: Any, seed: int | None = None):
    from gymnasium import spaces

    actions = env.action_space
    if not isinstance(actions, spaces.Discrete):
      raise ValueError(f'action space is {actions}: must be Discrete')
    self._env = env
    self._seed = seed
    self._over = True
    self._start = int(actions.start)
    self._num_actions = int(actions.n)
    space = env.observation_space
    self._spec: Any
    if isinstance(space, spaces.Dict):
      self._spec = {k: _spec(s, k) for k, s in space.spaces.items()}
    else:
      self._spec = _spec(space, 'observation')

  def reset(self) -> dm_env.TimeStep:
    observation, _ = self._env.reset(seed=self._seed)
    self._seed = None
    self._over = False
    return dm_env.restart(self._convert(observation))

  def step(self, action: int) -> dm_env.TimeStep:
    if self._over:
      return self.reset()
    observation, reward, terminated, truncated, _ = self._env.step(
      int(action) + self._start
    )
    observation = self._convert(observation)
    self._over = bool(terminated or truncated)
    if terminated:
      return dm_env.termination(float(reward), observation)
    if truncated:
      return dm_env.truncation(float(reward), observation)
    return dm_env.transition(float(reward), observation)

  def observation_spec(self) -> Any:
    return self._spec

  def action_spec(self) -> specs.DiscreteArray:
    return specs.DiscreteArray(self._num_actions, np.int32, 'action')

  def frame(self) -> np.ndarray | None:
    """A picture, uint8 [H, W, 3], or None where `render_mode` is not rgb_array."""
    return self._env.render() if self._env.render_mode == 'rgb_array' else None

  def close(self) -> None:
    self._env.close()

  def _convert(self, observation: Any) -> Any:
    if isinstance(self._spec, dict):
      return {k: np.asarray(observation[k], s.dtype) for k, s in self._spec.items()}
    return np.asarray(observation, self._spec.dtype)


def _spec(space: Any, name: str) -> specs.Array:
  from gymnasium import spaces

  if isinstance(space, spaces.Box):
    return specs.BoundedArray(space.shape, space.dtype, space.low, space.high, name)
  if isinstance(space, spaces.Discrete | spaces.MultiBinary | spaces.MultiDiscrete):
    return specs.Array(space.shape, np.int32, name)
  raise ValueError(
    f'observation space {name!r} is {space}: must be Box, Discrete, MultiBinary or '
    'MultiDiscrete, or a Dict of these'
  )
