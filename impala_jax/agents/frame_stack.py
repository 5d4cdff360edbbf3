"""Stacks of the latest frames, made where they are used.

Environments deliver single frames and each frame travels once. The agent keeps the
`k - 1` frames before the current one as recurrent state: [B, H, W, C * (k - 1)],
oldest first, zeros for frames from before the episode.
"""

import jax
import jax.numpy as jnp

from impala_jax import types


def initial(batch_size: int, frame: types.ArraySpec, k: int) -> types.Array:
  """State without frames: zeros [B, H, W, C * (k - 1)] of the frame's dtype."""
  height, width, channels = frame.shape
  return jnp.zeros((batch_size, height, width, channels * (k - 1)), frame.dtype)


def stack(
  frames: types.Array, first: types.Array, state: types.Array, k: int
) -> tuple[types.Array, types.Array]:
  """Joins each frame with the `k - 1` before it in its episode.

  Args:
    frames: [T, B, H, W, C].
    first: bool [T, B], whether an episode starts here.
    state: [B, H, W, C * (k - 1)], the frames before frames[0]; ignored where
      first[0].
    k: frames in a stack, at least 2.

  Returns:
    Stacks [T, B, H, W, C * k], oldest frame first, zeros for frames from before the
    episode, and the state after the last step.
  """
  t, _, height, width, channels = frames.shape
  previous = state.reshape(-1, height, width, k - 1, channels)
  padded = jnp.concatenate([jnp.moveaxis(previous, 3, 0), frames])
  time = jnp.arange(t)[:, None]
  # The state's own boundary was masked when it was made, hence "long ago".
  start = jax.lax.cummax(jnp.where(first, time, -k), axis=0)
  parts = []
  for age in range(k - 1, 0, -1):
    inside = (time - age >= start)[..., None, None, None]
    parts.append(jnp.where(inside, padded[k - 1 - age : k - 1 - age + t], 0))
  stacks = jnp.concatenate([*parts, frames], axis=-1)
  return stacks, stacks[-1, ..., channels:]
