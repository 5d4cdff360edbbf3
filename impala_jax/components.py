"""From a configuration to the parts that every role of a run agrees on."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from impala_jax import config as config_lib
from impala_jax import losses, optimizers, types, unroll_layout
from impala_jax.agents import agent as agent_lib
from impala_jax.environments import base, registry, vector
from impala_jax.learning import learner


@dataclasses.dataclass(frozen=True)
class Custom:
  """What a user brings along; None stands for what the configuration says.

  Attributes:
    environment: called with a seed keyword, makes one `dm_env.Environment` of
      which `actor.envs_per_actor` are run.
    network: a flax module, see `agents.agent.make_agent`.
    loss: see `losses.LossFn`.
  """

  environment: Callable[..., Any] | None = None
  network: Any = None
  loss: losses.LossFn | None = None


class Components(NamedTuple):
  config: config_lib.Config
  spec: types.EnvironmentSpec
  agent: agent_lib.Agent
  layout: unroll_layout.UnrollLayout
  custom: Custom

  def make_learner(self, frames_ahead: int = 0) -> learner.Learner:
    """The update over the devices of all learner processes of the run.

    Args:
      frames_ahead: see `optimizers.make_optimizer`.

    Raises:
      config_lib.ConfigError: batch and devices do not fit.
    """
    found = [jax.local_devices(process_index=p) for p in range(jax.process_count())]
    fewest = min(map(len, found))
    config_lib.validate(self.config, fewest, len(found))
    count = self.config.learner.num_devices
    if not count and any(len(devices) > fewest for devices in found):
      raise config_lib.ConfigError(
        'learner.num_devices is 0 (all): the learners have '
        f'{", ".join(str(len(d)) for d in found)} devices; all must use equally '
        f'many, at most {fewest}'
      )
    return learner.Learner(
      self.agent,
      self.custom.loss or losses.make_loss(self.config.loss),
      optimizers.make_optimizer(self.config, frames_ahead),
      self.layout,
      [d for devices in found for d in devices[: count or fewest]],
    )

  def make_environments(self, actor_id: int) -> base.VectorEnvironment:
    """The training environments of one actor."""
    if self.custom.environment is None:
      return registry.make_vector(self.config, actor_id)
    return self._custom_vector(self.config.actor.envs_per_actor)

  def make_evaluation(self, level: str, episodes: int) -> base.VectorEnvironment:
    """`episodes` environments of one level, played as whole games."""
    if self.custom.environment is None:
      return registry.make_vector(
        self.config, 0, evaluation=True, num_envs=episodes, level=level
      )
    return self._custom_vector(episodes)

  def make_scene(self, level: str) -> registry.Scene | None:
    """One filmed environment that plays whole games; None where none can be."""
    if self.custom.environment is None:
      return registry.make_scene(self.config, level)
    return None

  def _custom_vector(self, count: int) -> base.VectorEnvironment:
    assert self.custom.environment is not None
    return vector.SequentialVector([self.custom.environment] * count)


def build(config: config_lib.Config, custom: Custom | None = None) -> Components:
  """Validates `config` and builds what follows from it.

  Raises:
    config_lib.ConfigError: lists all impossible settings and unknown levels.
  """
  custom = custom or Custom()
  config_lib.validate(config)
  if custom.environment is None:
    spec = registry.environment_spec(config)
  else:
    probe = vector.SequentialVector([custom.environment])
    spec = probe.spec
    probe.close()
  if custom.network is None:
    agent = _untouched(lambda: agent_lib.from_config(config.network, spec))
  else:
    agent = _untouched(lambda: agent_lib.make_agent(custom.network, spec))
  one = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
    jax.eval_shape(lambda: agent.initial_state(1)),
  )
  layout = unroll_layout.UnrollLayout(
    unroll_layout.unroll_spec(
      spec, one, config.actor.unroll_length, config.actor.send_logits
    ),
    spec.num_actions,
  )
  config_lib.check_sizes(config, layout.nbytes // (config.actor.unroll_length + 1))
  return Components(config, spec, agent, layout, custom)


def _untouched(make: Callable[[], agent_lib.Agent]) -> agent_lib.Agent:
  """`make()` with shapes for arrays: no device is touched.

  Several learners must join before the first use of one.
  """
  made = []
  jax.eval_shape(lambda: made.append(make()))
  return made[0]
