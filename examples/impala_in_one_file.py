"""IMPALA on one page, from top to bottom: `python -m examples.impala_in_one_file`.

Espeholt et al. 2018 (arXiv 1802.01561) in the order in which its data flows: actors
play with parameters that are a little old, send what happened as unrolls through a
queue, and a learner corrects for their age with V-trace, makes one step of gradient
descent, and hands out new parameters. The game is Catch: a ball falls down a board of
10 x 5 cells, and a paddle in the last row must be under it. Random play has a mean
return of about -0.6, perfect play 1; this page has 0.95 in less than a minute.

What a long run needs besides (many machines, checkpoints, metrics, failures) is what
the rest of this package is for.
"""

import collections
import queue
import threading
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from impala_jax import ImpalaNetwork, TimeStep, Unroll, make_agent, types, vtrace
from impala_jax.environments import catch

ACTORS = 2  # Threads that play.
GAMES = 16  # Each actor plays so many games side by side; they are a batch, too.
LENGTH = 9  # Agent steps of an unroll.
UPDATES = 1000  # Of the learner, each from GAMES * LENGTH steps.
DISCOUNT = 0.99
BASELINE_COST = 0.5
ENTROPY_COST = 0.003
LEARNING_RATE = 2e-3

SPEC = types.EnvironmentSpec(types.ArraySpec((10, 5), np.dtype(np.float32)), 3)


class Torso(nn.Module):
  """What makes a vector of a board: [N, 10, 5] -> [N, 64]."""

  @nn.compact
  def __call__(self, board):
    x = board.reshape(board.shape[0], -1)
    return nn.relu(nn.Dense(64)(nn.relu(nn.Dense(64)(x))))


# The agent is a few pure functions. `agent.step` decides for a batch of games, and
# `agent.unroll` computes policy and value of every step of an unroll. Write `lstm=32`
# here for a memory: the rest of the page carries the recurrent state already.
AGENT = make_agent(ImpalaNetwork(num_actions=3, torso=Torso(), lstm=0), SPEC)


class Shared:
  """What the learner and its actors have in common."""

  def __init__(self, params):
    self.params = params  # The newest ones; the learner alone replaces them.
    self.unrolls = queue.Queue(maxsize=2)  # A full queue holds the actors back.
    self.done = False


def actor(shared, seed):
  """Plays for ever and sends unrolls."""
  step = jax.jit(AGENT.step)
  key = jax.random.key(seed)
  games = [catch.Catch(seed=1000 * seed + i) for i in range(GAMES)]
  timestep = stacked([game.reset() for game in games])
  last_action = np.zeros(GAMES, np.int32)
  state = AGENT.initial_state(GAMES)
  while not shared.done:
    # Parameters change between unrolls only. While this unroll is played, waits in
    # the queue and is learned from, the learner goes on: the policy that acted, mu,
    # is not the policy that learns, pi.
    params = shared.params
    begin = last_action, state
    timesteps, actions, log_probs = [timestep], [], []
    for _ in range(LENGTH):
      key, sample_key = jax.random.split(key)
      decision = step(params, sample_key, timestep, last_action, state)
      last_action, state = np.asarray(decision.action), decision.state
      # After the LAST step of an episode the action is ignored, and FIRST comes.
      timestep = stacked([g.step(a) for g, a in zip(games, last_action, strict=True)])
      timesteps.append(timestep)
      actions.append(last_action)
      # What V-trace needs to know of mu is how likely it found its actions.
      log_probs.append(np.asarray(decision.log_prob))
    # All arrays have time in front. There is one time step more than there are
    # actions, and the next unroll begins with the last one of this: each step is
    # learned from once, and the value of what followed it is known.
    unroll = Unroll(
      timestep=jax.tree.map(lambda *x: np.stack(x), *timesteps),
      action=np.stack(actions),
      behaviour_log_prob=np.stack(log_probs),
      behaviour_logits=None,
      last_action=begin[0],
      agent_state=begin[1],
      task_id=np.zeros(GAMES, np.int32),
    )
    while not shared.done:
      try:
        shared.unrolls.put(unroll, timeout=0.1)
        break
      except queue.Full:
        continue


def stacked(steps):
  """One `TimeStep` of arrays [GAMES, ...] from the games' own."""
  return TimeStep(
    step_type=np.array([int(s.step_type) for s in steps], np.uint8),
    # On a FIRST step both are None, since nothing led to it.
    reward=np.array([s.reward or 0.0 for s in steps], np.float32),
    discount=np.array([1.0 if s.first() else s.discount for s in steps], np.float32),
    observation=np.stack([s.observation for s in steps]),
  )


def loss(params, unroll):
  """The loss, summed over the steps of an unroll, and the mean |pi / mu - 1|."""
  # Policy and value under the newest parameters, from the state in which the actor
  # began; `last_action[t]` is the action that led to step t.
  last_action = jnp.concatenate([unroll.last_action[None], unroll.action])
  output, _ = AGENT.unroll(params, unroll.timestep, last_action, unroll.agent_state)
  log_pi = jax.nn.log_softmax(output.logits[:-1])
  log_pi_a = jnp.take_along_axis(log_pi, unroll.action[..., None], axis=-1)[..., 0]

  # The step from the end of one episode to the beginning of the next is none of the
  # game: there is no loss on it, and no value passes over it.
  valid = unroll.timestep.step_type[1:] != types.StepType.FIRST
  # `reward[t + 1]` and `discount[t + 1]` belong to the step from t to t + 1. The
  # environment's discount is 0 where a game has ended, so that nothing follows.
  returns = vtrace.vtrace(
    log_rhos=log_pi_a - unroll.behaviour_log_prob,
    discounts=DISCOUNT * unroll.timestep.discount[1:],
    rewards=unroll.timestep.reward[1:],
    values=output.baseline[:-1],
    next_values=output.baseline[1:],
    valid=valid,
  )

  # Targets and advantages are constants for the gradient. The policy goes up the
  # advantage, the value towards its target, and a little entropy keeps it curious.
  policy_loss = -jnp.sum(log_pi_a * returns.pg_advantages)
  errors = jnp.where(valid, returns.vs - output.baseline[:-1], 0.0)
  entropy = jnp.where(valid, -jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1), 0.0)
  total = (
    policy_loss
    + BASELINE_COST * 0.5 * jnp.sum(jnp.square(errors))
    - ENTROPY_COST * jnp.sum(entropy)
  )
  return total, jnp.mean(jnp.abs(returns.rhos - 1.0), where=valid)


def train(seed=0, updates=UPDATES):
  """Trains, and gives the mean return of the last 500 games."""
  schedule = optax.linear_schedule(LEARNING_RATE, 0.0, updates)
  optimizer = optax.chain(optax.clip_by_global_norm(40.0), optax.adam(schedule))

  @jax.jit
  def update(params, opt_state, unroll):
    gradients, off_policy = jax.grad(loss, has_aux=True)(params, unroll)
    changes, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, changes), opt_state, off_policy

  params = AGENT.init(jax.random.key(seed))
  opt_state = optimizer.init(params)
  shared = Shared(params)
  threads = [
    threading.Thread(target=actor, args=(shared, ACTORS * seed + i), daemon=True)
    for i in range(ACTORS)
  ]
  for thread in threads:
    thread.start()

  returns = collections.deque(maxlen=500)
  start = time.monotonic()
  try:
    for done in range(1, updates + 1):
      unroll = shared.unrolls.get(timeout=120.0)
      params, opt_state, off_policy = update(params, opt_state, unroll)
      shared.params = params
      # In Catch the last reward of a game is its whole return.
      over = unroll.timestep.step_type[1:] == types.StepType.LAST
      returns.extend(unroll.timestep.reward[1:][over].tolist())
      if done % 100 == 0:
        print(
          f'{done * GAMES * LENGTH:7,d} steps in {time.monotonic() - start:4.1f} s: '
          f'mean return {np.mean(returns):5.2f}, mean |pi/mu - 1| {off_policy:.3f}'
        )
  finally:
    shared.done = True
    for thread in threads:
      thread.join(timeout=10.0)
  return float(np.mean(returns))


if __name__ == '__main__':
  train()
