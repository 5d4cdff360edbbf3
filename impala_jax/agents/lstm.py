"""LSTM over time-major sequences, with resets inside the sequence."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from impala_jax import types

State = tuple[types.Array, types.Array]  # (h, c), float32 [B, units] each.


def zero_state(batch_size: int, units: int) -> State:
  """The state at the start of an episode."""
  # Two arrays: a caller may donate both.
  return jnp.zeros((batch_size, units)), jnp.zeros((batch_size, units))


class LSTM(nn.Module):
  """h_t = o tanh(c_t), c_t = f c_{t-1} + i g (Hochreiter & Schmidhuber 1997; Gers
  et al. 2000), with `i, f, g, o` in this order along the last axis of the weights.

  1 is added to the pre-activation of the forget gate, so that a new network
  remembers. The projection of the inputs of all steps is one matrix product; only
  the recurrent one is inside the scan.
  """

  units: int

  @nn.compact
  def __call__(
    self,
    inputs: types.Array,
    state: State,
    reset: types.Array | None = None,
    skip: types.Array | None = None,
  ) -> tuple[types.Array, State]:
    """Runs over the leading axis.

    Args:
      inputs: float32 [T, B, D].
      state: float32 ([B, units], [B, units]) before the first step.
      reset: bool [T, B], where the state is zeroed before the step (whatever it
        holds, NaN included). None for nowhere.
      skip: bool [T, B], where the step leaves the state as it is. None for nowhere.

    Returns:
      float32 [T, B, units], h after each step, and the state after the last one.
    """
    projected = nn.Dense(4 * self.units, name='input')(inputs)
    kernel = self.param(
      'recurrent', nn.initializers.orthogonal(), (self.units, 4 * self.units)
    )

    def step(carry, x):
      projected, reset, skip = x
      if reset is not None:
        carry = jax.tree.map(lambda s: jnp.where(reset[:, None], 0.0, s), carry)
      h, c = carry
      i, f, g, o = jnp.split(projected + h @ kernel, 4, axis=-1)
      new_c = nn.sigmoid(f + 1.0) * c + nn.sigmoid(i) * jnp.tanh(g)
      new_h = nn.sigmoid(o) * jnp.tanh(new_c)
      if skip is not None:
        new_h = jnp.where(skip[:, None], h, new_h)
        new_c = jnp.where(skip[:, None], c, new_c)
      return (new_h, new_c), new_h

    state, outputs = jax.lax.scan(step, state, (projected, reset, skip))
    return outputs, state
