"""Actors with a policy of their own, as tests want them."""

from typing import Any

from impala_jax.acting import actor, policy


def make(
  agent: Any,
  environment: Any,
  layout: Any,
  writer: Any,
  parameters: Any,
  *,
  unroll_length: int,
  inference_batch: int = 0,
  max_lag: int = 0,
  greedy: bool = False,
  seed: int = 0,
  **settings: Any,
) -> actor.Actor:
  """An actor; `settings` are its own."""
  local = policy.Local(
    agent,
    parameters,
    environment.num_envs,
    unroll_length=unroll_length,
    batch=inference_batch,
    max_lag=max_lag,
    greedy=greedy,
    seed=seed,
  )
  return actor.Actor(
    local,
    environment,
    layout,
    writer,
    unroll_length=unroll_length,
    seed=seed,
    **settings,
  )
