"""A small agent, its learner and random, sound unrolls.

Agent, layout and learners are made once: they hold no state, and what one test has
compiled serves the others.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from impala_jax import config as config_lib
from impala_jax import losses, optimizers, types, unroll_layout
from impala_jax.agents import agent as agent_lib
from impala_jax.agents import networks
from impala_jax.learning import learner

SPEC = types.EnvironmentSpec(types.ArraySpec((3, 2), np.dtype(np.float32)), 4)
UNROLL_LENGTH = 5


class Torso(nn.Module):
  """One dense layer."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.relu(nn.Dense(8)(x.reshape(x.shape[0], -1).astype(jnp.float32)))


def config(**settings: str) -> config_lib.Config:
  base = [
    'environment.suite=catch',
    'actor.unroll_length=5',
    'learner.batch_size=4',
    'learner.total_frames=2000',
    'network.frame_stack=1',
  ]
  extra = [f'{k.replace("__", ".")}={v}' for k, v in settings.items()]
  return config_lib.override(config_lib.Config(), base + extra)


@functools.cache
def agent() -> agent_lib.Agent:
  return agent_lib.make_agent(networks.ImpalaNetwork(4, Torso(), lstm=6), SPEC)


@functools.cache
def layout() -> unroll_layout.UnrollLayout:
  state = jax.tree.map(lambda x: x[0], agent().initial_state(1))
  return unroll_layout.UnrollLayout(
    unroll_layout.unroll_spec(SPEC, state, UNROLL_LENGTH)
  )


@functools.cache
def make_learner(cfg: config_lib.Config, devices: int = 1) -> learner.Learner:
  return learner.Learner(
    agent(),
    losses.make_loss(cfg.loss),
    optimizers.make_optimizer(cfg),
    layout(),
    jax.local_devices()[:devices],
  )


def unroll(seed: int) -> types.Unroll:
  """A random unroll with an episode boundary now and then."""
  rng = np.random.default_rng(seed)
  t = UNROLL_LENGTH
  step_type = np.full(t + 1, types.StepType.MID, np.uint8)
  if seed % 2:
    step_type[2:4] = types.StepType.LAST, types.StepType.FIRST
  return types.Unroll(
    timestep=types.TimeStep(
      step_type=step_type,
      reward=rng.normal(size=t + 1).astype(np.float32),
      discount=np.ones(t + 1, np.float32),
      observation=rng.normal(size=(t + 1, 3, 2)).astype(np.float32),
    ),
    action=rng.integers(4, size=t).astype(np.int32),
    behaviour_log_prob=np.full(t, -np.log(4), np.float32),
    behaviour_logits=None,
    last_action=np.int32(1),
    agent_state=jax.tree.map(lambda x: np.asarray(x[0]), agent().initial_state(1)),
    task_id=np.int32(0),
  )


def rows(seed: int, batch: int = 4, sequence: int = 0, version: int = 0) -> np.ndarray:
  """uint8 [batch, nbytes], sealed."""
  form = layout()
  out = form.allocate(batch)
  out[:] = 0
  for i in range(batch):
    form.pack(out[i], unroll(100 * seed + i))
    form.seal(out[i], actor_id=0, incarnation=0, sequence=sequence + i, version=version)
  return out
