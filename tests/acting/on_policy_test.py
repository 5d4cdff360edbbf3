"""Actor and learner with the same parameters compute the same policy.

Then pi / mu is 1 in every step, whatever V-trace would forgive: an observation, an
action, a reward, a reset or a recurrent state that is one step off on either side
shows as another ratio.
"""

import dm_env
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dm_env import specs

from impala_jax import config as config_lib
from impala_jax import losses, types, unroll_layout
from impala_jax.agents import agent as agent_lib
from impala_jax.distributed.transport import local as local_transport
from impala_jax.environments import vector
from impala_jax.learning import learner as learner_lib
from tests import actors

_T = 4
# Fewer are ready than there are, and fewer fit into a policy call: so unrolls begin at
# any place of a call, and in some calls only.
_ENVS, _READY, _ROWS = 5, 3, 2
_UNROLLS = 30
_ACTIONS = 5
_FRAME = (20, 21, 1)


class _Noise(dm_env.Environment):
  """Random pictures, words and rewards; episodes shorter and longer than unrolls."""

  def __init__(self, seed: int):
    self._rng = np.random.default_rng(seed)
    self._left = 0

  def reset(self) -> dm_env.TimeStep:
    self._left = int(self._rng.integers(1, 9))
    return dm_env.restart(self._observation())

  def step(self, action: int) -> dm_env.TimeStep:
    if not self._left:
      return self.reset()
    self._left -= 1
    make = dm_env.transition
    if not self._left:
      make = (dm_env.termination, dm_env.truncation)[int(self._rng.integers(2))]
    return make(float(self._rng.normal()), self._observation())

  def observation_spec(self) -> dict[str, specs.Array]:
    return {
      'frame': specs.Array(_FRAME, np.uint8, 'frame'),
      'instruction': specs.Array((3,), np.int32, 'instruction'),
    }

  def action_spec(self) -> specs.DiscreteArray:
    return specs.DiscreteArray(_ACTIONS)

  def _observation(self) -> dict[str, np.ndarray]:
    return {
      'frame': self._rng.integers(0, 256, _FRAME, np.uint8),
      'instruction': self._rng.integers(0, 3, 3, np.int32),
    }


class _Fixed:
  """A learner that never learns."""

  def __init__(self, params: types.Nest):
    self._params = params

  def fetch(self, have_version: int) -> tuple[int, types.Nest] | None:
    return (0, self._params) if have_version < 0 else None


def _ratios(output: types.AgentOutput, unroll: types.Unroll):
  """In the place of a loss: log pi - log mu of each step, and how far logits differ."""
  log_pi = jax.nn.log_softmax(output.logits[:-1])
  log_pi = jnp.take_along_axis(log_pi, unroll.action[..., None], axis=-1)[..., 0]
  return 0.0, {
    'log_rhos': log_pi - unroll.behaviour_log_prob,
    'logits': output.logits[:-1] - unroll.behaviour_logits,
    'log_pi': log_pi,
  }


def _params(agent: agent_lib.Agent) -> types.Nest:
  """Random ones, with which each input moves the policy."""
  rng = np.random.default_rng(0)

  def draw(x: jax.ShapeDtypeStruct) -> np.ndarray:
    fan_in = max(1, np.prod(x.shape[:-1]))
    return (rng.normal(size=x.shape) * (2 / fan_in) ** 0.5).astype(np.float32)

  params = jax.tree.map(draw, jax.eval_shape(agent.init, jax.random.key(0)))
  params['policy']['kernel'] *= 3
  return params


@pytest.mark.parametrize(
  'network',
  [
    config_lib.Network('mlp', 16, lstm=8, frame_stack=1, last_action_reward=True),
    config_lib.Network('shallow', 16, frame_stack=4),
    config_lib.Network('deep', 16, 8, 3, last_action_reward=True, instructions=True),
  ],
  ids=lambda network: network.torso,
)
def test_without_lag_every_importance_ratio_is_1(network):
  environments = vector.SequentialVector(
    [lambda i=i: _Noise(i) for i in range(_ENVS)], max_ready=_READY
  )
  agent = agent_lib.from_config(network, environments.spec)
  params = _params(agent)
  state = jax.tree.map(lambda x: x[0], agent.initial_state(1))
  layout = unroll_layout.UnrollLayout(
    unroll_layout.unroll_spec(environments.spec, state, _T, with_logits=True)
  )
  queue = local_transport.LocalTransport(layout, _UNROLLS, _UNROLLS)
  actor = actors.make(
    agent,
    environments,
    layout,
    queue.writer(),
    _Fixed(params),
    unroll_length=_T,
    inference_batch=_ROWS,
    send_logits=True,
  )
  actor.run(max_unrolls=_UNROLLS)
  rows = jnp.asarray(queue.read(timeout=30).rows)
  unroll = jax.jit(lambda x: learner_lib.time_major(layout.unpack(x)))(rows)
  _, found = jax.jit(learner_lib.objective(agent, _ratios))(params, unroll)
  queue.close()

  valid = np.asarray(losses.valid_transitions(unroll.timestep.step_type))
  assert 0 < valid.sum() < valid.size
  # Else nothing could have been seen.
  assert np.std(found['log_pi'], where=valid) > 0.5
  np.testing.assert_allclose(found['log_rhos'][valid], 0, atol=2e-4)
  np.testing.assert_allclose(found['logits'], 0, atol=1e-3)
