"""The agent: pure functions over a network, for actors and the learner alike."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from impala_jax import config as configs
from impala_jax import settings, types
from impala_jax.agents import networks, torsos

Params = types.Nest  # Nested dict of float32 arrays.


class AgentStep(NamedTuple):
  """One decision for each of B environments."""

  action: types.Array  # int32 [B]
  log_prob: types.Array  # float32 [B], log pi(action).
  logits: types.Array  # float32 [B, A]
  baseline: types.Array  # float32 [B]
  state: types.Nest  # [B, ...], recurrent state after this step.


_Step = Callable[
  [Params, jax.Array, types.TimeStep, types.Array, types.Nest], AgentStep
]


class Agent(NamedTuple):
  """Pure functions, to be jitted by the caller.

  The recurrent state (and with it the frame stack) is reset inside, before every
  step whose `step_type` is FIRST; there `last_action` and `reward` are ignored.
  """

  # (key) -> params
  init: Callable[[jax.Array], Params]
  # (batch size B) -> state [B, ...]; () for a network without memory.
  initial_state: Callable[[int], types.Nest]
  # (params, timestep [T, B, ...], last_action int32 [T, B], state [B, ...])
  # -> (AgentOutput [T, B, ...], state [B, ...] after the last step);
  # last_action[t] led to timestep[t].
  unroll: Callable[
    [Params, types.TimeStep, types.Array, types.Nest],
    tuple[types.AgentOutput, types.Nest],
  ]
  # (params, key, timestep [B, ...], last_action int32 [B], state [B, ...])
  step: _Step  # Samples the policy with `key`.
  greedy_step: _Step  # Takes the likeliest action; `key` is not used.


def make_agent(network: nn.Module, spec: types.EnvironmentSpec) -> Agent:
  """An agent around any suitable linen module.

  Args:
    network: has `__call__(timestep, last_action, state) -> (AgentOutput, state)` on
      [T, B], which resets its state on FIRST steps, and `initial_state(batch_size,
      spec) -> state`; see `networks.ImpalaNetwork`. It may have parameters only: no
      other variable collections, no random numbers.
    spec: the environment's observation and number of actions.

  Raises:
    ValueError: the network does not fit the environment or this interface.
  """

  def initial_state(batch_size: int) -> types.Nest:
    return network.initial_state(batch_size, spec)  # type: ignore[attr-defined]

  def init_variables(key: jax.Array) -> types.Nest:
    timestep, last_action = _zeros(spec, 1, 1)
    return network.init(key, timestep, last_action, initial_state(1))

  @jax.jit  # Drops the forward pass, which would run operation by operation.
  def init(key: jax.Array) -> Params:
    return init_variables(key).get('params', {})

  def unroll(params, timestep, last_action, state):
    return network.apply({'params': params}, timestep, last_action, state)

  def decide(params, timestep, last_action, state, choose):
    timestep, last_action = jax.tree.map(lambda x: x[None], (timestep, last_action))
    output, state = unroll(params, timestep, last_action, state)
    logits, baseline = output.logits[0], output.baseline[0]
    action = choose(logits).astype(jnp.int32)
    log_probs = jax.nn.log_softmax(logits)
    log_prob = jnp.take_along_axis(log_probs, action[:, None], axis=-1)[:, 0]
    return AgentStep(action, log_prob, logits, baseline, state)

  def step(params, key, timestep, last_action, state):
    sample = lambda logits: jax.random.categorical(key, logits)
    return decide(params, timestep, last_action, state, sample)

  def greedy_step(params, key, timestep, last_action, state):
    del key
    likeliest = lambda logits: jnp.argmax(logits, axis=-1)
    return decide(params, timestep, last_action, state, likeliest)

  _check_network(network, spec, init_variables, unroll)
  return Agent(init, initial_state, unroll, step, greedy_step)


def from_config(network: configs.Network, spec: types.EnvironmentSpec) -> Agent:
  """The agent of a configuration.

  Raises:
    config.ConfigError: lists all settings that no environment allows.
    ValueError: the network does not fit the environment.
  """
  settings.check(network, 'network.')
  torso = torsos.BY_NAME[network.torso](network.hidden, jnp.dtype(network.dtype))
  module = networks.ImpalaNetwork(
    spec.num_actions,
    torso,
    lstm=network.lstm,
    frame_stack=network.frame_stack,
    last_action_reward=network.last_action_reward,
    instructions=network.instructions,
  )
  return make_agent(module, spec)


def _zeros(
  spec: types.EnvironmentSpec, t: int, b: int
) -> tuple[types.TimeStep, types.Array]:
  """A time step [T, B, ...] and last actions [T, B] to trace with."""
  observation = jax.tree.map(
    lambda s: jnp.zeros((t, b, *s.shape), s.dtype),
    spec.observation,
    is_leaf=lambda x: isinstance(x, types.ArraySpec),
  )
  timestep = types.TimeStep(
    step_type=jnp.zeros((t, b), jnp.uint8),
    reward=jnp.zeros((t, b), jnp.float32),
    discount=jnp.zeros((t, b), jnp.float32),
    observation=observation,
  )
  return timestep, jnp.zeros((t, b), jnp.int32)


def _check_network(
  network: nn.Module,
  spec: types.EnvironmentSpec,
  init_variables: Callable[[jax.Array], types.Nest],
  unroll: Callable,
) -> None:
  """Traces the network once, without running it."""
  name = type(network).__name__
  if not isinstance(network, nn.Module) or not hasattr(network, 'initial_state'):
    raise ValueError(
      f'network is {name}: must be a flax.linen Module with a method '
      'initial_state(batch_size, spec)'
    )
  if spec.num_actions < 1:
    raise ValueError(f'spec.num_actions is {spec.num_actions}: must be at least 1')
  variables = jax.eval_shape(init_variables, jax.random.key(0))
  extra = sorted(set(variables) - {'params'})
  if extra:
    raise ValueError(
      f"network {name} has the variable collections {extra}: only 'params' is allowed"
    )

  t, b = 2, 3
  timestep, last_action = jax.eval_shape(lambda: _zeros(spec, t, b))
  state = jax.eval_shape(lambda: network.initial_state(b, spec))  # type: ignore[attr-defined]
  output, new_state = jax.eval_shape(
    unroll, variables.get('params', {}), timestep, last_action, state
  )
  expected = types.AgentOutput(
    logits=jax.ShapeDtypeStruct((t, b, spec.num_actions), np.float32),
    baseline=jax.ShapeDtypeStruct((t, b), np.float32),
  )
  for what, got, want in (
    ('output', output, expected),
    ('state after a step', new_state, state),
  ):
    if _describe(got) != _describe(want):
      raise ValueError(
        f'network {name}: {what} (for T = {t}, B = {b}) is {_describe(got)}, must be '
        f'{_describe(want)}'
      )


def _describe(tree: types.Nest) -> str:
  return str(jax.tree.map(lambda x: f'{x.dtype}{list(x.shape)}', tree))
