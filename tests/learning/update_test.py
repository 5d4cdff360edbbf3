"""Whole updates against NumPy: gradient, clip, optimiser step, what is published.

The network is linear, so that its gradient is an outer product; the losses' gradients
are those of `numpy_reference`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from impala_jax import config as config_lib
from impala_jax import losses, optimizers, types, unroll_layout
from impala_jax.agents import agent as agent_lib
from impala_jax.learning import learner as learner_lib
from tests import numpy_reference as reference
from tests import packed_unrolls

T, A = packed_unrolls.T, packed_unrolls.A
B = 4
SPEC = types.EnvironmentSpec(types.ArraySpec((2,), np.dtype(np.float32)), A)
FIRST = types.StepType.FIRST
CONFIG = dataclasses.replace(
  config_lib.Config(),
  loss=config_lib.Loss(
    rho_clip=2.5,
    c_clip=1.2,
    pg_rho_clip=0.8,
    trace_lambda=0.9,
    entropy_cost=0.3,
    reward_clipping='soft_asymmetric',
  ),
  optimizer=config_lib.Optimizer(
    learning_rate=0.05, momentum=0.9, epsilon=0.1, max_grad_norm=50.0
  ),
  environment=config_lib.Environment(suite='catch', levels=('catch',)),
  actor=config_lib.Actor(unroll_length=T),
  # So that the learning rate falls by a fifth with each update.
  learner=config_lib.Learner(batch_size=B, total_frames=5 * B * T),
)


class Linear(nn.Module):
  """Sees the observation, the last action and reward, and the state, which stays."""

  @nn.compact
  def __call__(self, timestep, last_action, state):
    first = timestep.step_type == FIRST
    x = jnp.concatenate(
      [
        timestep.observation,
        jax.nn.one_hot(jnp.where(first, -1, last_action), A),
        jnp.where(first, 0.0, timestep.reward)[..., None],
        jnp.broadcast_to(state[None], (len(first), *state.shape)),
      ],
      axis=-1,
    )
    logits = nn.Dense(A, use_bias=False, name='policy')(x)
    baseline = nn.Dense(1, use_bias=False, name='baseline')(x)
    return types.AgentOutput(logits, baseline[..., 0]), state

  def initial_state(self, batch_size, spec):
    return jnp.zeros((batch_size, 1))


AGENT = agent_lib.make_agent(Linear(), SPEC)
LAYOUT = unroll_layout.UnrollLayout(
  unroll_layout.unroll_spec(SPEC, np.zeros(1, np.float32), T)
)


def make_batch(seed):
  """A time-major unroll, stretches of episodes in it, and the rows that hold it."""
  rng = np.random.default_rng(seed)
  output, unroll = packed_unrolls.make_batch(seed, batch=B)
  starts = ([], [3], [1, 2, 9], [T])
  ends = ('end', 'time_limit', 'restart', 'end')
  stretches = [
    packed_unrolls.cut(output, unroll, b, starts[b], ends, np.nan) for b in range(B)
  ]
  unroll = unroll._replace(
    timestep=unroll.timestep._replace(
      observation=rng.normal(size=(T + 1, B, 2)).astype(np.float32),
      # What an unroll begins with is known to whoever goes on from the one before.
      reward=np.where(np.arange(T + 1)[:, None] == 0, 0.5, unroll.timestep.reward),
    ),
    last_action=rng.integers(A, size=B).astype(np.int32),
    agent_state=rng.normal(size=(B, 1)).astype(np.float32),
    task_id=np.zeros(B, np.int32),
  )
  rows = LAYOUT.allocate(B)
  for b in range(B):
    column = lambda x, b=b: x[:, b]
    LAYOUT.pack(
      rows[b],
      types.Unroll(
        jax.tree.map(column, unroll.timestep),
        column(unroll.action),
        column(unroll.behaviour_log_prob),
        None,
        *(x[b] for x in unroll[4:]),
      ),
    )
  return unroll, stretches, rows


def features(unroll):
  """float64 [T + 1, B, 7] of `Linear`, step by step."""
  x = np.zeros((T + 1, B, 2 + A + 2))
  for t in range(T + 1):
    for b in range(B):
      x[t, b, :2] = unroll.timestep.observation[t, b]
      if unroll.timestep.step_type[t, b] != FIRST:
        action = unroll.action[t - 1, b] if t else unroll.last_action[b]
        x[t, b, 2 + action] = 1
        x[t, b, 2 + A] = unroll.timestep.reward[t, b]
      x[t, b, -1] = unroll.agent_state[b, 0]
  return x


def gradient(weights, unroll, stretches):
  """Of the loss by `weights` [7, A + 1] (policy, baseline).

  And the loss's parts, and the entropy of each valid step by column of the batch.
  """
  x = features(unroll)
  output = x @ weights
  slopes = np.zeros((T + 1, B, A + 1))
  parts = dict.fromkeys(('policy_loss', 'baseline_loss', 'entropy_loss'), 0.0)
  entropies = [[] for _ in range(B)]
  for b in range(B):
    for first, last in stretches[b]:
      one = reference.loss(
        output[first:last, b, :A],
        output[first : last + 1, b, A],
        unroll.action[first:last, b],
        unroll.behaviour_log_prob[first:last, b],
        unroll.timestep.reward[first + 1 : last + 1, b],
        unroll.timestep.discount[first + 1 : last + 1, b],
        CONFIG.loss,
      )
      slopes[first:last, b, :A] = one['grad_logits']
      slopes[first : last + 1, b, A] += one['grad_baseline']
      for name in parts:
        parts[name] += one[name]
      entropies[b].extend(one['entropies'])
  return np.einsum('tbf,tbo->fo', x, slopes), parts, entropies


def flat(params):
  """[7, A + 1] of the parameters of `Linear`, or of a gradient."""
  return np.hstack([params['policy']['kernel'], params['baseline']['kernel']])


@pytest.mark.parametrize('devices', [1, 4])
def test_updates_are_the_papers(devices):
  """Three updates and between them a batch that is refused and leaves no trace."""
  learner = learner_lib.Learner(
    AGENT,
    losses.make_loss(CONFIG.loss),
    optimizers.make_optimizer(CONFIG),
    LAYOUT,
    jax.local_devices()[:devices],
  )
  state = learner.init(3)
  weights = start = flat(learner_lib.to_host(state.params)).astype(np.float64)
  gradients, norms = [], []
  for update, seed in enumerate([0, 1, None, 2]):
    unroll, stretches, rows = make_batch(seed or 0)
    if seed is None:
      LAYOUT.views(rows)[0].observation[-1, 3] = np.inf
    state, params, figures = learner.update(state, learner.put(rows))
    params, figures = learner_lib.to_host((params, figures))
    if seed is not None:
      found, parts, entropies = gradient(weights, unroll, stretches)
      norms.append(np.linalg.norm(found))
      gradients.append(found * min(1, 50 / norms[-1]))
      rates = 0.05 * (1 - np.arange(len(gradients)) / 5)
      weights = reference.rmsprop(
        start, gradients, rates, decay=0.99, epsilon=0.1, momentum=0.9
      )[-1]
      parts['total_loss'] = sum(parts.values())
      parts['grad_norm'] = norms[-1]
      parts['valid_steps'] = sum(z - a for column in stretches for a, z in column)
      # What is not a sum is the mean over devices of theirs.
      shares = np.split(np.arange(B), devices)
      parts['entropy'] = np.mean(
        [np.mean(np.concatenate([entropies[b] for b in share])) for share in shares]
      )
      for name, value in parts.items():
        np.testing.assert_allclose(figures[name], value, rtol=1e-3, err_msg=name)
    np.testing.assert_allclose(flat(params), weights, rtol=1e-4, atol=1e-4)
    host = learner_lib.to_host(state)
    np.testing.assert_array_equal(flat(params), flat(host.params))
    assert (host.updates, host.skipped) == (update + 1, update >= 2)
    assert figures['skipped'] == host.skipped
  # Both sides of the clip were seen.
  assert min(norms) < 50 < max(norms)


@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_loss_and_gradient_must_both_be_finite(what):
  """A sound gradient of a loss that overflows is refused, and the other way round."""

  def loss_fn(output, unroll):
    del unroll
    values = jnp.sum(jnp.square(output.baseline))
    # The slope of the root at 0 is infinite, and its value 0.
    extra = jnp.inf if what == 'loss' else jnp.sqrt(0.0 * values)
    return values + extra, {}

  update = jax.jit(
    learner_lib.make_update(AGENT, loss_fn, optimizers.make_optimizer(CONFIG), LAYOUT)
  )
  _, _, rows = make_batch(0)
  before = learner_lib.init_state(
    AGENT, optimizers.make_optimizer(CONFIG), jax.random.key(0)
  )
  after, params, figures = update(before, rows)
  assert np.isfinite(figures['total_loss']) == (what != 'loss')
  assert np.isfinite(figures['grad_norm']) == (what != 'gradient')
  assert after.skipped == after.updates == 1
  kept = before.params, before.opt_state, before.params
  jax.tree.map(
    np.testing.assert_array_equal, (after.params, after.opt_state, params), kept
  )


@pytest.mark.parametrize(
  ('optimizer', 'words'),
  [
    (optax.sgd(3e38), 'the new parameter '),
    (optax.adam(1e-3, b1=1.0), 'the new parameter '),
    (
      optax.chain(optax.trace(0.9, accumulator_dtype=jnp.float16), optax.scale(0.0)),
      "the optimiser's new ",
    ),
  ],
)
def test_new_parameters_and_the_optimisers_state_must_be_finite_too(optimizer, words):
  def loss_fn(output, unroll):
    del unroll
    return 1e6 * jnp.sum(output.baseline), {'own_loss': jnp.zeros(())}

  update = jax.jit(learner_lib.make_update(AGENT, loss_fn, optimizer, LAYOUT))
  _, _, rows = make_batch(0)
  before = learner_lib.init_state(AGENT, optimizer, jax.random.key(0))
  after, params, figures = update(before, rows)
  assert np.isfinite(figures['total_loss'])
  assert np.isfinite(figures['grad_norm'])
  assert after.skipped == after.updates == 1
  found = learner_lib.suspects(before, figures)[int(figures['culprit'])]
  assert found.startswith(words)
  kept = before.params, before.opt_state, before.params
  jax.tree.map(
    np.testing.assert_array_equal, (after.params, after.opt_state, params), kept
  )


def test_the_first_culprit_is_named():
  def culprit(loss_fn):
    optimizer = optax.sgd(0.1)
    update = learner_lib.make_update(AGENT, loss_fn, optimizer, LAYOUT)
    before = learner_lib.init_state(AGENT, optimizer, jax.random.key(0))
    _, _, figures = jax.jit(update)(before, make_batch(0)[2])
    return learner_lib.suspects(before, figures)[int(figures['culprit'])]

  total = lambda output: jnp.sum(output.baseline)
  parts = {'a_loss': jnp.zeros(()), 'b_loss': jnp.full((), jnp.nan)}
  assert culprit(lambda output, _: (total(output), parts)) == 'nothing'
  assert culprit(lambda output, _: (total(output) + jnp.inf, parts)) == 'b_loss'
  assert culprit(lambda output, _: (total(output) + jnp.inf, {})) == 'total_loss'
  root = lambda output, _: (jnp.sqrt(0.0 * total(output)), {})
  assert culprit(root).startswith('the gradient of ')
