"""The policies that the actors of a configuration have."""

import pathlib

import jax

from impala_jax import components, device_policy
from impala_jax import policy as policy_lib
from impala_jax.distributed import inference_link, inference_wire
from impala_jax.environments import registry


def local(
  parts: components.Components,
  source: policy_lib.ParameterSource,
  index: int,
  incarnation: int,
) -> policy_lib.Local:
  """One in the actor's own process.

  Raises:
    config.ConfigError: `actor.platform` is not to be had here.
  """
  config = parts.config
  return policy_lib.Local(
      parts.agent, source, config.actor.envs_per_actor,
      unroll_length=config.actor.unroll_length,
      seed=registry.random_seed(config.seed, index, incarnation),
      batch=config.actor.inference_batch, max_lag=config.learner.max_policy_lag,
      device=device_policy.device_for(config.actor.platform, index, 'actor.platform'),
  )  # fmt: skip


def remote(
  parts: components.Components,
  run_dir: pathlib.Path,
  index: int,
  keys: pathlib.Path | None,
) -> inference_link.Remote:
  """That of the inference server to which the actor was dealt.

  Raises:
    run_keys.KeysError: see `inference_link.open_remote`.
  """
  config = parts.config
  return inference_link.open_remote(
    run_dir,
    config.inference.servers,
    index,
    config.actor.envs_per_actor,
    wire(parts),
    keys,
  )


def wire(parts: components.Components) -> inference_wire.Wire:
  """The form of messages between the actors and inference servers of a run."""
  states = jax.eval_shape(lambda: parts.agent.initial_state(1))
  one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), states)
  return inference_wire.Wire(parts.spec, one)
