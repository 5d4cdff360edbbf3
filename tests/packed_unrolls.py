"""Unrolls with episode boundaries anywhere, and garbage where nothing may be read."""

import itertools

import numpy as np

from impala_jax import types

T, B, A = 12, 2, 3
FIRST, MID, LAST = types.StepType.FIRST, types.StepType.MID, types.StepType.LAST
# How a stretch of one episode stops: by a true end, by a time limit that the agent
# does not see, or because the environment was restarted (the unroll's end is alike).
ENDS = ('end', 'time_limit', 'restart')


def make_batch(seed, steps=T, batch=B):
  """Network outputs and one uninterrupted stretch per column, far off-policy."""
  rng = np.random.default_rng(seed)
  rows = (steps + 1, batch)
  output = types.AgentOutput(
    logits=rng.normal(size=(*rows, A)).astype(np.float32) * 2,
    baseline=rng.normal(size=rows).astype(np.float32) * 3,
  )
  timestep = types.TimeStep(
    step_type=np.full(rows, MID, np.uint8),
    reward=rng.normal(size=rows).astype(np.float32) * 4,
    discount=np.ones(rows, np.float32),
    observation=None,
  )
  unroll = types.Unroll(
    timestep=timestep,
    action=rng.integers(A, size=(steps, batch)).astype(np.int32),
    behaviour_log_prob=np.log(rng.uniform(0.05, 1, (steps, batch))).astype(np.float32),
    behaviour_logits=None,
    last_action=None,
    agent_state=None,
    task_id=None,
  )
  return output, unroll


def cut(output, unroll, b, starts, ends, garbage):
  """Puts episode boundaries into column b of a batch, in place.

  Args:
    starts: increasing rows > 0 that are FIRST.
    ends: one of ENDS for each stretch in turn (more are ignored).
    garbage: float written wherever nothing may be read.

  Returns:
    The stretches, as pairs (first row, last row).
  """
  rows = [0, *starts, len(output.baseline)]
  stretches = [(a, z - 1) for a, z in itertools.pairwise(rows)]
  step_type, reward, discount, _ = unroll.timestep
  for row in starts:
    step_type[row, b] = FIRST
    unroll.action[row - 1, b] = 10**6 if np.isnan(garbage) else -1
    unroll.behaviour_log_prob[row - 1, b] = garbage
    output.logits[row - 1, b] = garbage
  for row in (0, *starts):
    reward[row, b] = discount[row, b] = garbage
  for (first, last), end in zip(stretches, ends, strict=False):
    if first < last and end != 'restart':
      step_type[last, b] = LAST
      discount[last, b] = 0.0 if end == 'end' else 1.0
  output.logits[-1, b] = garbage
  return stretches
