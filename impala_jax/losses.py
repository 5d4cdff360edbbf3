"""The loss of an unroll, and the rule at episode boundaries.

An unroll may hold several episodes. The step from the last time step of one to the
first of the next is no transition of the environment: its reward, discount, action
and log-probability mean nothing, and no value may pass over it. This module alone
decides which transitions count; `vtrace` and the sums below obey.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from impala_jax import config as config_lib
from impala_jax import types, vtrace

Metrics = dict[str, jax.Array]
# (time-major outputs [T + 1, B], time-major unroll) -> (loss f32 [], metrics f32 []).
LossFn = Callable[[types.AgentOutput, types.Unroll], tuple[jax.Array, Metrics]]

# Espeholt et al. 2018, section 5.2.2.
_EPSILON = 1e-6
# Below this variance of the targets, explained variance says nothing.
_MIN_VARIANCE = 1e-8


def valid_transitions(step_type: types.Array) -> jax.Array:
  """Which transitions t -> t+1 belong to one episode.

  Args:
    step_type: integer [T + 1, ...], of `types.StepType`.

  Returns:
    bool [T, ...], False where t+1 is the FIRST step of another episode.
  """
  return jnp.asarray(step_type)[1:] != types.StepType.FIRST


def clip_rewards(rewards: types.Array, kind: str) -> jax.Array:
  """Bounds rewards for learning.

  Args:
    rewards: float [...], raw.
    kind: `abs_one` clips to [-1, 1]; `soft_asymmetric` is the optimistic one for
      DMLab-30: with s = tanh(r / 5), 5 s for gains and 0.3 * 5 s for losses; `none`.

  Returns:
    float [...].

  Raises:
    ValueError: unknown `kind`.
  """
  raw = jnp.asarray(rewards)
  if kind == 'abs_one':
    return jnp.clip(raw, -1.0, 1.0)
  if kind == 'soft_asymmetric':
    squeezed = jnp.tanh(raw / 5.0)
    return jnp.where(raw < 0, 0.3, 1.0) * 5.0 * squeezed
  if kind == 'none':
    return raw
  allowed = ', '.join(types.REWARD_CLIPPING)
  raise ValueError(f'reward_clipping is {kind!r}: must be one of {allowed}')


def make_loss(config: config_lib.Loss) -> LossFn:
  """Makes the pure, jittable IMPALA loss with fixed settings.

  The loss is the SUM over time and batch of

      -log pi(a_t|x_t) adv_t + baseline_cost 1/2 (v_t - V(x_t))^2
      - entropy_cost H(pi(.|x_t))

  (Espeholt et al. 2018, section 4.2) over valid transitions, with v_t and adv_t
  constants from `vtrace.vtrace`. An episode cut by a time limit (LAST with discount 1)
  bootstraps from the value of its last observation, one that truly ended from 0.

  Returns:
    A function of time-major arguments
      output: logits float [T + 1, B, A], baseline float [T + 1, B],
      unroll: time step leaves [T + 1, B, ...], action integer [T, B],
        behaviour_log_prob float [T, B]; the other fields are not read,
    that returns the loss f32 [] and metrics, each f32 []:
      policy_loss, baseline_loss, entropy_loss: the three summands;
      entropy, mean_value, mean_advantage: means over valid transitions, in nats and
        units of clipped reward;
      mean_rho, clipped_rho_fraction: of the unclipped ratio pi/mu, and how often it
        exceeds rho_clip;
      kl: estimate of KL(mu || pi) in nats from the actions taken (may fall below 0);
      explained_variance: 1 - Var(v - V) / Var(v), 0 where all targets agree;
      valid_steps: number of valid transitions.
    An action out of range in a valid transition makes the loss NaN, so that the
    learner refuses the batch.

    A logit of -inf forbids its action. Its probability is 0, and it adds 0 to entropy
    and gradients; where it was taken all the same, the policy learns nothing from it.
  """

  def loss_fn(
    output: types.AgentOutput, unroll: types.Unroll
  ) -> tuple[jax.Array, Metrics]:
    _check_shapes(output, unroll)
    valid = valid_transitions(unroll.timestep.step_type)

    def keep(x: jax.Array) -> jax.Array:
      # Chosen before any arithmetic: 0 * NaN is NaN, in gradients too.
      mask = valid.reshape(valid.shape + (1,) * (x.ndim - valid.ndim))
      return jnp.where(mask, x, jnp.zeros_like(x))

    def mean(x: jax.Array) -> jax.Array:
      return jnp.sum(keep(x)) / jnp.maximum(jnp.sum(valid), 1)

    baseline = jnp.asarray(output.baseline, jnp.float32)
    logits = keep(jnp.asarray(output.logits, jnp.float32)[:-1])
    log_probs = jax.nn.log_softmax(logits)
    log_pi = _select(log_probs, keep(unroll.action))
    log_rhos = log_pi - keep(unroll.behaviour_log_prob)
    returns = vtrace.vtrace(
      log_rhos=log_rhos,
      discounts=config.discount * keep(unroll.timestep.discount[1:]),
      rewards=clip_rewards(keep(unroll.timestep.reward[1:]), config.reward_clipping),
      values=baseline[:-1],
      next_values=baseline[1:],
      valid=valid,
      rho_clip=config.rho_clip,
      c_clip=config.c_clip,
      pg_rho_clip=config.pg_rho_clip,
      lambda_=config.trace_lambda,
      correction=config.correction,
      method=config.vtrace_method,
    )

    if config.correction == 'epsilon_correction':
      log_policy = jnp.log(jnp.exp(log_pi) + _EPSILON)
    else:
      log_policy = log_pi
    errors = keep(returns.vs - baseline[:-1])
    entropy = keep(-jnp.sum(jnp.exp(log_probs) * _finite(log_probs), axis=-1))
    policy_loss = -jnp.sum(_finite(log_policy) * returns.pg_advantages)
    baseline_loss = config.baseline_cost * 0.5 * jnp.sum(jnp.square(errors))
    entropy_loss = -config.entropy_cost * jnp.sum(entropy)

    error_variance = mean(jnp.square(errors - mean(errors)))
    target_variance = mean(jnp.square(returns.vs - mean(returns.vs)))
    unexplained = error_variance / jnp.maximum(target_variance, _MIN_VARIANCE)
    metrics = {
      'policy_loss': policy_loss,
      'baseline_loss': baseline_loss,
      'entropy_loss': entropy_loss,
      'entropy': mean(entropy),
      'mean_value': mean(baseline[:-1]),
      'mean_advantage': mean(returns.pg_advantages),
      'mean_rho': mean(returns.rhos),
      'clipped_rho_fraction': mean((returns.rhos > config.rho_clip) * 1.0),
      'kl': mean(-log_rhos),
      'explained_variance': jnp.where(
        target_variance < _MIN_VARIANCE, 0.0, 1.0 - unexplained
      ),
      'valid_steps': jnp.sum(valid) * 1.0,
    }
    loss = policy_loss + baseline_loss + entropy_loss
    return loss, jax.tree.map(jax.lax.stop_gradient, metrics)

  return loss_fn


def _finite(log_probs: jax.Array) -> jax.Array:
  """0 for the logarithm of 0: every factor that it meets is 0, and 0 * inf is NaN."""
  return jnp.where(jnp.isneginf(log_probs), 0.0, log_probs)


def _select(log_probs: jax.Array, action: jax.Array) -> jax.Array:
  """log_probs[..., action], NaN where the action is out of range."""
  chosen = jnp.take_along_axis(log_probs, action[..., None], axis=-1)[..., 0]
  # JAX counts negative indices from the end.
  in_range = (action >= 0) & (action < log_probs.shape[-1])
  return jnp.where(in_range, chosen, jnp.nan)


def _check_shapes(output: types.AgentOutput, unroll: types.Unroll) -> None:
  chex.assert_rank(output.logits, 3)
  steps, batch, _ = output.logits.shape
  chex.assert_axis_dimension_gt(output.logits, 0, 1)
  timestep = unroll.timestep
  chex.assert_shape(
    [output.baseline, timestep.step_type, timestep.reward, timestep.discount],
    (steps, batch),
  )
  chex.assert_shape([unroll.action, unroll.behaviour_log_prob], (steps - 1, batch))
  floats = [timestep.reward, timestep.discount, unroll.behaviour_log_prob]
  chex.assert_type([output.logits, output.baseline, *floats], float)
  chex.assert_type([unroll.action, timestep.step_type], int)
