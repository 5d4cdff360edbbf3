"""V-trace targets and advantages, and the variants its paper compares it with.

Formulas: Espeholt et al. 2018 (arXiv 1802.01561), section 4.1. All arrays are
time-major, `[T, ...]` with any trailing batch axes.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from impala_jax import types

# exp(20) is about 5e8: far beyond any clip, and products of it with a TD error stay
# finite in float32.
_MAX_LOG_RHO = 20.0

# What `auto` uses where the computation is lowered for, at any T: T sequential steps
# of little work, or about 2 log2(T) steps that do about twice the work. On CPU (JAX
# 0.7.1 and 0.10.2, `experiments/benchmarks/vtrace_benchmark.py`) the two tie at T x B
# = 20 x 32; at 20 x 1024, 100 x 32 and 100 x 1024 the scan takes 0.3 to 0.8 of the
# time. The accelerators' entries are reasoned, not measured: each step is at least
# one kernel launch there, so fewer steps should win.
_AUTO_METHOD = {
  'cpu': 'scan',
  'cuda': 'associative',
  'rocm': 'associative',
  'tpu': 'associative',
}


_Affine = tuple[jax.Array, jax.Array]


class VTraceOutput(NamedTuple):
  """Constants for the gradient: nothing flows back through them."""

  vs: types.Array  # float32 [T, ...], value targets v_t; V(x_t) where not valid.
  pg_advantages: types.Array  # float32 [T, ...], weighted; 0 where not valid.
  rhos: types.Array  # float32 [T, ...], unclipped pi/mu; 0 where not valid.


def vtrace(
  log_rhos: types.Array,
  discounts: types.Array,
  rewards: types.Array,
  values: types.Array,
  next_values: types.Array,
  *,
  valid: types.Array | None = None,
  rho_clip: float = 1.0,
  c_clip: float = 1.0,
  pg_rho_clip: float = 1.0,
  lambda_: float = 1.0,
  correction: str = 'vtrace',
  method: str = 'auto',
) -> VTraceOutput:
  """Computes value targets and policy-gradient advantages of one unroll.

  With w = pi(a_t|x_t) / mu(a_t|x_t):

      delta_t = rho_t (r_t + gamma_t V(x_{t+1}) - V(x_t))
      v_t     = V(x_t) + delta_t + gamma_t c_t (v_{t+1} - V(x_{t+1}))
      adv_t   = rho^pg_t (r_t + gamma_t v_{t+1} - V(x_t))

  where v_T = V(x_T), and the weights are

      correction          rho_t             c_t                    rho^pg_t
      vtrace              min(rho_clip, w)  lambda min(c_clip, w)  min(pg_rho_clip, w)
      one_step_is         1                 lambda                 min(pg_rho_clip, w)
      epsilon_correction  1                 lambda                 1
      no_correction       1                 lambda                 1

  `epsilon_correction` differs from `no_correction` in the policy's log-probability,
  which the loss takes.

  Args:
    log_rhos: float [T, ...], log pi(a_t|x_t) - log mu(a_t|x_t); clamped to
      [-20, 20] before it is exponentiated.
    discounts: float [T, ...], gamma_t of the transition t -> t+1, 0 at a true end.
    rewards: float [T, ...], r_t of the transition t -> t+1.
    values: float [T, ...], V(x_t).
    next_values: float [T, ...], V(x_{t+1}) under the same parameters; the last one is
      the bootstrap.
    valid: bool [T, ...], False where t -> t+1 is no transition of the environment
      (from the last step of an episode to the first of the next). There every weight
      is exactly 0, so nothing passes from t+1 to t or before, and no input of that
      entry, not even NaN, reaches another entry. None for all True.
    rho_clip: upper bound of rho_t, decides which policy's value is estimated.
    c_clip: upper bound of c_t / lambda, at most `rho_clip`. Above 1 products of T
      weights grow without bound: `lambda_` times it, or times the largest ratio where
      that is less, must be at most `types.largest_trace_weight(T)` (4.0 for T = 20).
    pg_rho_clip: upper bound of rho^pg_t.
    lambda_: mixes n-step (1) and one-step (0) targets; in [0, 1].
    correction: one of `types.CORRECTIONS`.
    method: one of `types.VTRACE_METHODS`: a sequential scan, an associative scan of
      logarithmic depth, or what suits the platform compiled for. They differ in
      rounding alone.

  Raises:
    ValueError: unknown `correction` or `method`, or impossible clips.
    AssertionError: ranks, shapes or dtypes do not fit (when traced).
  """
  _check_settings(rho_clip, c_clip, pg_rho_clip, lambda_, correction, method)
  inputs = [jnp.asarray(x) for x in (log_rhos, discounts, rewards, values, next_values)]
  chex.assert_equal_shape(inputs)
  chex.assert_type(inputs, float)
  chex.assert_rank(inputs[0], set(range(1, 9)))
  chex.assert_axis_dimension_gt(inputs[0], 0, 0)
  if correction == 'vtrace':
    _check_product(c_clip, lambda_, len(inputs[0]))
  # Stopped at the entrance, so that autodiff never sees the scans.
  inputs = [jax.lax.stop_gradient(x.astype(jnp.float32)) for x in inputs]
  log_rhos, discounts, rewards, values, next_values = inputs

  rhos = jnp.exp(jnp.clip(log_rhos, -_MAX_LOG_RHO, _MAX_LOG_RHO))
  ones = jnp.ones_like(rhos)
  rho = jnp.minimum(rhos, rho_clip) if correction == 'vtrace' else ones
  c = lambda_ * (jnp.minimum(rhos, c_clip) if correction == 'vtrace' else ones)
  weighted = correction in ('vtrace', 'one_step_is')
  pg_rho = jnp.minimum(rhos, pg_rho_clip) if weighted else ones

  delta = rho * (rewards + discounts * next_values - values)
  decay = discounts * c
  if valid is not None:
    chex.assert_shape(valid, delta.shape)
    chex.assert_type(valid, bool)
    # Chosen, not multiplied: 0 * NaN is NaN.
    rhos, delta, decay = (jnp.where(valid, x, 0.0) for x in (rhos, delta, decay))

  errors = _solve(decay, delta, method)
  next_errors = jnp.concatenate([errors[1:], jnp.zeros_like(errors[:1])])
  target = rewards + discounts * (next_values + next_errors)
  advantages = pg_rho * (target - values)
  if valid is not None:
    advantages = jnp.where(valid, advantages, 0.0)
  return VTraceOutput(vs=values + errors, pg_advantages=advantages, rhos=rhos)


def _solve(decay: jax.Array, delta: jax.Array, method: str) -> jax.Array:
  """Solves e_t = delta_t + decay_t e_{t+1}, e_T = 0, for e_t = v_t - V(x_t)."""
  if method == 'auto':
    # Decided by the platform of the compiled computation, which under jit need not be
    # the default backend.
    branches = {p: _SOLVERS[m] for p, m in _AUTO_METHOD.items()}
    errors: jax.Array = jax.lax.platform_dependent(
      decay, delta, default=_solve_scan, **branches
    )
    return errors
  return _SOLVERS[method](decay, delta)


def _solve_scan(decay: jax.Array, delta: jax.Array) -> jax.Array:
  start = jnp.zeros_like(delta[0])
  return jax.lax.scan(_step, start, (decay, delta), reverse=True)[1]


def _solve_associative(decay: jax.Array, delta: jax.Array) -> jax.Array:
  errors: jax.Array
  _, errors = jax.lax.associative_scan(_compose, (decay, delta), reverse=True)
  return errors


# At module level, so that calls outside jit find the compiled scan of the last one.
def _step(error_tp1: jax.Array, inputs_t: _Affine) -> tuple[jax.Array, jax.Array]:
  decay_t, delta_t = inputs_t
  error_t = delta_t + decay_t * error_tp1
  return error_t, error_t


def _compose(later: _Affine, earlier: _Affine) -> _Affine:
  """The map e -> delta_e + decay_e e after the map e -> delta_l + decay_l e."""
  decay_l, delta_l = later
  decay_e, delta_e = earlier
  return decay_l * decay_e, delta_e + decay_e * delta_l


_SOLVERS = {'scan': _solve_scan, 'associative': _solve_associative}


def _check_settings(
  rho_clip: float,
  c_clip: float,
  pg_rho_clip: float,
  lambda_: float,
  correction: str,
  method: str,
) -> None:
  for name, value, allowed in (
    ('correction', correction, types.CORRECTIONS),
    ('method', method, types.VTRACE_METHODS),
  ):
    if value not in allowed:
      raise ValueError(f'{name} is {value!r}: must be one of {", ".join(allowed)}')
  for name, number in (
    ('rho_clip', rho_clip),
    ('c_clip', c_clip),
    ('pg_rho_clip', pg_rho_clip),
    ('lambda_', lambda_),
  ):
    if not number >= 0:
      raise ValueError(f'{name} is {number!r}: must not be negative')
  if lambda_ > 1:
    raise ValueError(f'lambda_ is {lambda_!r}: must lie in [0, 1]')
  if c_clip > rho_clip:
    raise ValueError(f'c_clip is {c_clip!r}: must not exceed rho_clip ({rho_clip!r})')


def _check_product(c_clip: float, lambda_: float, steps: int) -> None:
  most = types.largest_trace_weight(steps)
  if lambda_ * min(c_clip, math.exp(_MAX_LOG_RHO)) > most:
    raise ValueError(
      f'c_clip is {c_clip!r}: lambda_ times c_clip must be at most {most:.4g} for '
      f'{steps} steps, or products of the weights overflow'
    )
