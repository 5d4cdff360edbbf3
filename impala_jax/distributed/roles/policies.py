"""The policies that the actors of a configuration have."""

import functools
import pathlib

import jax

from impala_jax import components, types
from impala_jax.acting import device_policy
from impala_jax.acting import policy as policy_lib
from impala_jax.agents import agent as agent_lib
from impala_jax.distributed.control import protocol
from impala_jax.distributed.inference import connection as inference_connection
from impala_jax.distributed.inference import remote as remote_policy
from impala_jax.distributed.inference import wire as inference_wire
from impala_jax.distributed.security import keys as run_keys
from impala_jax.environments import registry
from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory


def local(
  parts: components.Components,
  source: protocol.ParameterSource,
  index: int,
  incarnation: int,
) -> policy_lib.Local:
  """One in the actor's own process.

  Raises:
    config.ConfigError: `actor.platform` is not to be had here.
  """
  config = parts.config
  return policy_lib.Local(
    parts.agent,
    source,
    config.actor.envs_per_actor,
    unroll_length=config.actor.unroll_length,
    seed=registry.random_seed(config.seed, index, incarnation),
    batch=config.actor.inference_batch,
    max_lag=config.learner.max_policy_lag,
    device=device_policy.device_for(config.actor.platform, index, 'actor.platform'),
  )


def remote(
  parts: components.Components,
  run_dir: pathlib.Path,
  index: int,
  keys: pathlib.Path | None,
) -> remote_policy.RemotePolicy:
  """That of the inference server to which an actor was dealt, or of the others.

  Connects with its first call.

  Args:
    parts: of the run.
    run_dir: of the run; holds the servers' addresses.
    index: of the actor.
    keys: folder of the run's keys, for mutual TLS.

  Raises:
    run_keys.KeysError: no connection will ever be possible.
  """
  config = parts.config
  own = None if keys is None else run_keys.load(keys, run_keys.CLIENT)
  count = config.inference.servers
  paths = [
    RunDirectory(run_dir).inference_address((index + k) % count) for k in range(count)
  ]
  form = wire(parts.agent, parts.spec)
  return remote_policy.RemotePolicy(
    [functools.partial(_server_address, path) for path in paths],
    lambda address: inference_connection.Connection(address, form, own),
    f'actor {index}',
    config.actor.envs_per_actor,
  )


def _server_address(path: pathlib.Path) -> remote_policy.ServerAddress | None:
  found = files.read_json(path)
  if 'address' not in found:
    return None
  return remote_policy.ServerAddress(found['address'], found['incarnation'])


def wire(agent: agent_lib.Agent, spec: types.EnvironmentSpec) -> inference_wire.Wire:
  """The form of messages between the actors and inference servers of a run."""
  states = jax.eval_shape(lambda: agent.initial_state(1))
  one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), states)
  return inference_wire.Wire(spec, one)
