"""LSTM over time-major sequences, with resets inside the sequence."""

from typing import Any

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
  remembers. The projection of the inputs of all steps is one matrix product, and so
  is the gradient of either matrix; only the recurrent product is inside a scan.
  Gradients are of reverse mode alone.
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

    return _recur(projected, kernel, state, reset, skip)


def _cell(z: types.Array, c: types.Array) -> State:
  """(h, c) after a step with pre-activations [..., 4 units] and `c` before it."""
  i, f, g, o = jnp.split(z, 4, axis=-1)
  c = nn.sigmoid(f + 1.0) * c + nn.sigmoid(i) * jnp.tanh(g)
  return nn.sigmoid(o) * jnp.tanh(c), c


def _where(mask: types.Array | None, x: types.Array, y: types.Array) -> types.Array:
  """`jnp.where` with a mask that has no axis of units, or that is False throughout."""
  return y if mask is None else jnp.where(mask[..., None], x, y)


def _zero(mask: types.Array | None, state: State) -> State:
  return jax.tree.map(lambda s: _where(mask, jnp.zeros_like(s), s), state)


def _shift(first: types.Array, after: types.Array) -> types.Array:
  """What was before each step, from what was before the first and after each."""
  return jnp.concatenate([first[None], after[:-1]])


def _steps_a_round(steps: int) -> int:
  """Of a scan's loop. Several need fewer kernels on a GPU; on CPU they gain nothing."""
  return 1 if jax.default_backend() == 'cpu' else min(steps, 4)


def _states(
  projected: types.Array, kernel: types.Array, state: State,
  reset: types.Array | None, skip: types.Array | None, keep_c: bool,
) -> tuple[State, tuple[types.Array, types.Array | None]]:  # fmt: skip
  """The last state, and h and (with `keep_c`) c after each step."""

  def step(carry: State, x: Any) -> tuple[State, Any]:
    projected, reset, skip = x
    h, c = _zero(reset, carry)
    new_h, new_c = _cell(projected + h @ kernel, c)
    h, c = _where(skip, h, new_h), _where(skip, c, new_c)
    return (h, c), (h, c if keep_c else None)

  return jax.lax.scan(
    step, state, (projected, reset, skip), unroll=_steps_a_round(len(projected))
  )


# By automatic differentiation the backward scan would add to the gradient of the
# kernel in each step, and the forward scan would store each gate by itself: 26 kernels
# a step on a GPU in place of 7.
@jax.custom_vjp
def _recur(projected, kernel, state, reset, skip):
  state, (h, _) = _states(projected, kernel, state, reset, skip, keep_c=False)
  return h, state


def _recur_forward(projected, kernel, state, reset, skip):
  last, (h, c) = _states(projected, kernel, state, reset, skip, keep_c=True)
  return (h, last), (projected, kernel, state, reset, skip, h, c)


def _recur_backward(residuals, gradients):
  projected, kernel, state, reset, skip, *after = residuals
  h, c = _zero(reset, jax.tree.map(_shift, state, tuple(after)))
  z = projected + h @ kernel
  # Left to itself XLA's CPU compiler multiplies by the kernel as it lies, along its
  # rows, in every step: 17 times as slow (JAX 0.7.1), or 2 (0.10.2).
  transposed = jax.lax.optimization_barrier(kernel.T)

  def step(carry: State, x: Any) -> tuple[State, types.Array]:
    z, c, outer, reset, skip = x
    dh, dc = carry[0] + outer, carry[1]
    _, pull = jax.vjp(_cell, z, c)
    dz, new_dc = pull((dh, dc))
    dz = _where(skip, jnp.zeros_like(dz), dz)
    before = _where(skip, dh, dz @ transposed), _where(skip, dc, new_dc)
    return _zero(reset, before), dz

  outer, last = gradients
  first, dz = jax.lax.scan(
    step, last, (z, c, outer, reset, skip), reverse=True, unroll=_steps_a_round(len(z))
  )
  flat = lambda x: x.reshape(-1, x.shape[-1])
  return dz, flat(h).T @ flat(dz), first, None, None


_recur.defvjp(_recur_forward, _recur_backward)
