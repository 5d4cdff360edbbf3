"""The agent's contract: steps, unrolls, resets and errors."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impala_jax import config, types
from impala_jax.agents import agent as agents
from impala_jax.agents import networks
from tests.agents import agent_inputs

_STEPS, _BATCH = 4, 3
_FULL = config.Network(
  hidden=16, lstm=8, frame_stack=3, last_action_reward=True, instructions=True
)


def _make_agent(torso, **changes):
  spec = agent_inputs.spec((40, 36, 1), instruction=4)
  network = dataclasses.replace(_FULL, torso=torso, **changes)
  return spec, agents.from_config(network, spec)


def _make(torso, **changes):
  spec, agent = _make_agent(torso, **changes)
  params = agent.init(jax.random.key(3))
  # Larger logits than the initial ones, so that differences show.
  params['policy']['kernel'] = params['policy']['kernel'] * 100
  return spec, agent, params


@pytest.fixture(scope='module', params=['shallow', 'deep', 'nature', 'mlp'])
def full(request):
  spec, agent, params = _make(request.param)
  return spec, agent._replace(unroll=jax.jit(agent.unroll)), params


def test_step_by_step_equals_unroll(full):
  spec, agent, params = full
  timestep, last_action = agent_inputs.inputs(spec, _STEPS, _BATCH)
  start = agent.initial_state(_BATCH)
  output, final = agent.unroll(params, timestep, last_action, start)
  assert np.isfinite(output.logits).all()

  step = jax.jit(agent.step)
  state = start
  for t in range(_STEPS):
    now, action = agent_inputs.at((timestep, last_action), t)
    result = step(params, jax.random.key(t), now, action, state)
    state = result.state
    got = types.AgentOutput(result.logits, result.baseline)
    agent_inputs.assert_close(got, agent_inputs.at(output, t))
  agent_inputs.assert_close(state, final)


@given(st.lists(st.booleans(), min_size=_STEPS, max_size=_STEPS), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_packed_episodes_equal_separate_ones(mlp, flags, seed):
  spec, agent, params = mlp
  first = np.repeat(np.array(flags)[:, None], _BATCH, axis=1)
  timestep, last_action = agent_inputs.inputs(spec, _STEPS, _BATCH, seed, first)
  # The state before the unroll is another episode's, unless it goes on here.
  earlier, earlier_action = agent_inputs.inputs(spec, 2, _BATCH, seed + 1)
  _, before = agent.unroll(params, earlier, earlier_action, agent.initial_state(_BATCH))
  output, final = agent.unroll(params, timestep, last_action, before)

  starts = [t for t in range(_STEPS) if flags[t] or t == 0]
  for start, end in zip(starts, [*starts[1:], _STEPS], strict=True):
    state = agent.initial_state(_BATCH) if flags[start] else before
    part, last = agent_inputs.at((timestep, last_action), slice(start, end))
    want, want_state = agent.unroll(params, part, last, state)
    got = agent_inputs.at(output, slice(start, end))
    agent_inputs.assert_close(got, want)
  agent_inputs.assert_close(final, want_state)


@pytest.fixture(scope='module')
def mlp():
  spec, agent, params = _make('mlp')
  return spec, agent._replace(unroll=jax.jit(agent.unroll)), params


def test_first_step_ignores_state_action_and_reward(full):
  spec, agent, params = full
  first = np.zeros((_STEPS, _BATCH), bool)
  first[0] = True
  timestep, last_action = agent_inputs.inputs(spec, _STEPS, _BATCH, first=first)
  clean = timestep._replace(reward=np.where(first, 0, timestep.reward))
  other_action = np.where(first, 0, last_action)
  start = agent.initial_state(_BATCH)
  want = agent.unroll(params, clean, other_action, start)
  garbage = agent_inputs.garbage_like(start)
  got = agent.unroll(params, timestep, last_action, garbage)
  agent_inputs.assert_close(got, want, 0)


@pytest.mark.parametrize('what', ['state', 'action', 'reward', 'frame', 'instruction'])
def test_later_steps_use(mlp, what):
  spec, agent, params = mlp
  none = np.zeros((1, _BATCH), bool)
  timestep, action = agent_inputs.inputs(spec, 1, _BATCH, first=none)
  state = agent.initial_state(_BATCH)
  before, _ = agent.unroll(params, timestep, action, state)
  observation = dict(timestep.observation)
  if what == 'state':
    state = jax.tree.map(lambda x: x + 1, state)
  elif what == 'action':
    action = (action + 1) % spec.num_actions
  elif what == 'reward':
    timestep = timestep._replace(reward=timestep.reward + 0.5)
  else:
    change = {'frame': lambda x: 255 - x, 'instruction': lambda x: x + 1}[what]
    observation[what] = change(observation[what])
    timestep = timestep._replace(observation=observation)
  after, _ = agent.unroll(params, timestep, action, state)
  assert (np.abs(after.baseline - before.baseline) > 1e-6).all()


def test_last_reward_is_clipped(mlp):
  spec, agent, params = mlp
  none = np.zeros((1, _BATCH), bool)
  timestep, action = agent_inputs.inputs(spec, 1, _BATCH, first=none)
  baselines = []
  for reward in (-50, -1, 1, 50):
    changed = timestep._replace(reward=np.full((1, _BATCH), reward, np.float32))
    state = agent.initial_state(_BATCH)
    baselines.append(agent.unroll(params, changed, action, state)[0].baseline)
  np.testing.assert_array_equal(baselines[0], baselines[1])
  np.testing.assert_array_equal(baselines[2], baselines[3])
  assert (np.abs(baselines[1] - baselines[2]) > 1e-6).all()


def test_step_samples_the_policy_and_greedy_step_does_not(mlp):
  spec, agent, params = mlp
  batch = 4000
  timestep, action = agent_inputs.inputs(spec, 1, 1, first=[[True]])
  repeat = lambda x: np.repeat(x[0], batch, axis=0)
  timestep, action = jax.tree.map(repeat, (timestep, action))
  state = agent.initial_state(batch)
  result = jax.jit(agent.step)(params, jax.random.key(0), timestep, action, state)
  assert result.action.dtype == np.int32
  log_probs = np.asarray(jax.nn.log_softmax(result.logits))
  taken = log_probs[np.arange(batch), result.action]
  np.testing.assert_allclose(result.log_prob, taken, rtol=1e-6)
  share = np.bincount(result.action, minlength=spec.num_actions) / batch
  # Five standard errors.
  np.testing.assert_allclose(share, np.exp(log_probs[0]), atol=5 * 0.5 / batch**0.5)

  again = jax.jit(agent.step)(params, jax.random.key(0), timestep, action, state)
  np.testing.assert_array_equal(again.action, result.action)
  other = jax.jit(agent.step)(params, jax.random.key(1), timestep, action, state)
  assert (np.asarray(other.action) != result.action).any()

  greedy = jax.jit(agent.greedy_step)(
    params, jax.random.key(0), timestep, action, state
  )
  np.testing.assert_array_equal(greedy.action, log_probs.argmax(-1))
  np.testing.assert_allclose(greedy.log_prob, log_probs.max(-1), rtol=1e-6)


def test_without_memory_the_state_is_empty():
  spec = agent_inputs.spec((3,), np.float32)
  agent = agents.from_config(config.Network('mlp', 8, frame_stack=1), spec)
  assert agent.initial_state(4) == ()
  params = agent.init(jax.random.key(0))
  timestep, action = agent_inputs.inputs(spec, 2, 4)
  output, state = agent.unroll(params, timestep, action, ())
  assert state == ()
  assert output.logits.shape == (2, 4, 5)


def test_state_leaves_have_the_batch_in_front(full):
  _, agent, _ = full
  state = agent.initial_state(7)
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), state)
  assert shapes == {
    'frames': ((7, 40, 36, 2), 'uint8'),
    'lstm': (((7, 8), 'float32'), ((7, 8), 'float32')),
  }


def test_bfloat16_torso_keeps_the_rest_float32():
  spec, agent, params = _make('shallow', dtype='bfloat16')
  exact_agent = _make_agent('shallow')[1]
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {'float32'}
  inputs = agent_inputs.inputs(spec, 2, _BATCH)
  start = agent.initial_state(_BATCH)
  output, state = jax.jit(agent.unroll)(params, *inputs, start)
  want, _ = jax.jit(exact_agent.unroll)(params, *inputs, start)
  assert {x.dtype.name for x in jax.tree.leaves(output)} == {'float32'}
  assert {x.dtype.name for x in jax.tree.leaves(state['lstm'])} == {'float32'}
  agent_inputs.assert_close(output, want, 0.05)
  assert np.abs(output.baseline - want.baseline).max() > 0


@pytest.mark.parametrize(
  ('torso', 'convolutions', 'flat', 'published'),
  [
    ('shallow', [(8, 3, 16), (4, 16, 32)], 7 * 10 * 32, 1.2e6),
    (
      'deep',
      [(3, 3, 16)] + 4 * [(3, 16, 16)] + [(3, 16, 32)] + 9 * [(3, 32, 32)],
      9 * 12 * 32,
      1.6e6,
    ),
  ],
)
def test_number_of_parameters_is_the_papers(torso, convolutions, flat, published):
  network = config.Network(torso, 256, 256, 1, True, True)
  agent = agents.from_config(network, agent_inputs.spec((72, 96, 3), np.uint8, 9, 16))
  params = jax.eval_shape(agent.init, jax.random.key(0))
  count = sum(x.size for x in jax.tree.leaves(params))

  expected = sum(k * k * i * o + o for k, i, o in convolutions) + (flat + 1) * 256
  expected += 1001 * 20 + (20 + 64 + 1) * 4 * 64
  expected += (256 + 9 + 1 + 64 + 256 + 1) * 4 * 256 + 257 * 10
  assert count == expected
  assert abs(count / published - 1) < 0.05


class _Own(nn.Module):
  """A user's network: counts the steps of the episode."""

  @nn.compact
  def __call__(self, timestep, last_action, state):
    x = nn.Dense(5)(timestep.observation)

    def count(n, first):
      n = jnp.where(first, 0, n) + 1
      return n, n

    state, counts = jax.lax.scan(count, state, timestep.step_type == 0)
    return types.AgentOutput(x, counts.astype(jnp.float32)), state

  def initial_state(self, batch_size, spec):
    return jnp.zeros(batch_size, jnp.int32)


def test_own_network():
  spec = agent_inputs.spec((3,), np.float32)
  agent = agents.make_agent(_Own(), spec)
  params = agent.init(jax.random.key(0))
  first = np.array([[1, 0, 0, 1, 0]], bool).T
  timestep, action = agent_inputs.inputs(spec, 5, 1, first=first)
  output, state = agent.unroll(params, timestep, action, agent.initial_state(1))
  np.testing.assert_array_equal(output.baseline[:, 0], [1, 2, 3, 1, 2])
  now = agent_inputs.at((timestep, action), 4)
  result = agent.step(params, jax.random.key(0), *now, state)
  np.testing.assert_array_equal(result.baseline, [3])


class _Mean(nn.Module):
  """A user's torso, with a wrong result on demand."""

  keep: bool = False

  @nn.compact
  def __call__(self, x):
    x = x.astype(jnp.float32)
    return x if self.keep else nn.Dense(6)(x.mean((1, 2)))


def test_own_torso_sees_stacked_frames():
  spec = agent_inputs.spec((4, 4, 2))
  network = networks.ImpalaNetwork(5, torso=_Mean(), lstm=4, frame_stack=3)
  params = agents.make_agent(network, spec).init(jax.random.key(0))
  assert params['torso']['Dense_0']['kernel'].shape == (6, 6)


_IMAGE = agent_inputs.spec((40, 40, 1))
_VECTOR = agent_inputs.spec((3,), np.float32)


@pytest.mark.parametrize(
  ('network', 'spec', 'message'),
  [
    (config.Network('deep', frame_stack=1), _VECTOR, r"'deep' needs images.*is \[3\]"),
    (config.Network('mlp'), _VECTOR, r'frame_stack is 4: must be 1 .* is \[3\]'),
    (
      config.Network(instructions=True),
      _IMAGE,
      "instructions is True: must be False unless .* 'instruction'.* has none",
    ),
    (
      config.Network(instructions=True),
      _IMAGE._replace(
        observation={
          'frame': _IMAGE.observation,
          'instruction': types.ArraySpec((4,), np.dtype(np.float32)),
        }
      ),
      r'int32 \[L\]; this one has float32\[4\]',
    ),
    (
      config.Network(),
      _IMAGE._replace(observation={'pixels': _IMAGE.observation}),
      r"entries \['pixels'\]: a dict needs 'frame'",
    ),
    (config.Network(), _IMAGE._replace(num_actions=0), 'num_actions is 0: must be at'),
    (
      config.Network('big', 0, -1, 0, dtype='float16'),
      _IMAGE,
      r"(?s)network.torso is 'big': must be one of shallow.*network.hidden is 0"
      r".*network.lstm is -1.*network.frame_stack is 0.*network.dtype is 'float16'",
    ),
  ],
)
def test_impossible_settings(network, spec, message):
  with pytest.raises(ValueError, match=message):
    agents.from_config(network, spec)


class _Broken(_Own):
  fault: str = ''

  @nn.compact
  def __call__(self, timestep, last_action, state):
    if self.fault == 'collection':
      self.variable('batch_stats', 'mean', jnp.zeros, 1)
    x = nn.Dense(4 if self.fault == 'actions' else 5)(timestep.observation)
    if self.fault == 'state':
      state = state.astype(jnp.float32)
    return types.AgentOutput(x, x[..., 0]), state


@pytest.mark.parametrize(
  ('network', 'message'),
  [
    (_Broken(fault='collection'), r"collections \['batch_stats'\]"),
    (_Broken(fault='actions'), r'output.*float32\[2, 3, 4\].*float32\[2, 3, 5\]'),
    (_Broken(fault='state'), r'state after a step.*float32\[3\].*must be int32\[3\]'),
    (nn.Dense(3), 'network is Dense: must be .* initial_state'),
  ],
)
def test_networks_that_do_not_fit(network, message):
  with pytest.raises(ValueError, match=message):
    agents.make_agent(network, _VECTOR)


def test_torso_that_does_not_fit():
  network = networks.ImpalaNetwork(5, _Mean(keep=True))
  with pytest.raises(ValueError, match=r'torso _Mean gave .* \[1, 40, 40, 1\].*1, D'):
    agents.make_agent(network, _IMAGE)


def test_gradients_are_finite_with_garbage_in_reset_steps():
  spec, agent, params = _make('deep')
  first = np.zeros((3, _BATCH), bool)
  first[::2] = True
  timestep, action = agent_inputs.inputs(spec, 3, _BATCH, first=first)
  garbage = agent_inputs.garbage_like(agent.initial_state(_BATCH))

  def loss(params):
    output, _ = agent.unroll(params, timestep, action, garbage)
    return (output.logits**2).sum() + (output.baseline**2).sum()

  gradients = jax.jit(jax.grad(loss))(params)
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.isfinite(gradient).all(), path
    assert np.abs(gradient).max() > 0, path
