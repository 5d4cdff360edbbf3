"""The data that flows from environments to the learner.

Shapes are written with these letters: `B` batch (unrolls or environments),
`T` steps of an unroll, `A` number of discrete actions. `...` stands for any
leading axes. Unrolls overlap by one step: an unroll of `T` actions holds
`T + 1` time steps, and its last time step is the first of the next unroll.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# How it is made good that an older policy acted, see `vtrace.vtrace`.
CORRECTIONS = ('vtrace', 'one_step_is', 'epsilon_correction', 'no_correction')
# How the recursion of V-trace is computed.
VTRACE_METHODS = ('auto', 'scan', 'associative')
# What products of V-trace's weights over an unroll may grow to: sums of so many TD
# errors stay finite in float32.
LARGEST_TRACE = 1e12
# How rewards are bounded for learning, see `losses.clip_rewards`.
REWARD_CLIPPING = ('abs_one', 'soft_asymmetric', 'none')

# NumPy on the actor's side, jax.Array inside jitted functions.
Array = Any
# Any pytree of arrays.
Nest = Any
# One row, [nbytes], or several, [..., nbytes]: see `unroll_layout`.
Rows = npt.NDArray[np.uint8]


def largest_trace_weight(steps: int) -> float:
  """Bound of V-trace's c in unrolls of so many steps, that no product overflows."""
  return max(1.0, float(LARGEST_TRACE ** (1 / steps)))


class StepType:
  """Values of `TimeStep.step_type`, those of `dm_env.StepType`."""

  FIRST = 0
  MID = 1
  LAST = 2


class ArraySpec(NamedTuple):
  """Shape and dtype of one array, without leading time or batch axes."""

  shape: tuple[int, ...]
  dtype: np.dtype[Any]


class TimeStep(NamedTuple):
  """What the agent sees at time t, and the transition that led there.

  `reward` and `discount` belong to the transition t-1 -> t, as in `dm_env`. On
  a FIRST step there was none: both are ignored by everything downstream.
  """

  step_type: Array  # uint8 [...], a StepType.
  reward: Array  # float32 [...], raw: clipped only in the loss and the network.
  discount: Array  # float32 [...], 0 at a true end, else 1 (also at time limits).
  observation: Nest  # Arrays [..., *observation shape]; images are uint8, HWC.


class AgentOutput(NamedTuple):
  """What a network computes for each time step."""

  logits: Array  # float32 [..., A], unnormalised log-probabilities.
  baseline: Array  # float32 [...], the value estimate V(x_t).


class Unroll(NamedTuple):
  """T consecutive steps of one environment under the behaviour policy.

  In transport the leading axis is `[B]` and time is second; inside the learner
  the time-major form `[T + 1, B, ...]` of `learner.time_major` is used.
  An unroll may hold several episodes: a transition into a FIRST step is not a
  transition of the environment, and the action before it was ignored.
  """

  timestep: TimeStep  # [T + 1, ...]
  action: Array  # int32 [T], taken at timestep[t].
  behaviour_log_prob: Array  # float32 [T], log mu(action[t] | x_t).
  behaviour_logits: Array | None  # float32 [T, A], where asked for.
  last_action: Array  # int32 [], the action that led to timestep[0].
  agent_state: Nest  # Recurrent state before timestep[0] was processed.
  task_id: Array  # int32 [], index into the configured levels.


class EnvironmentSpec(NamedTuple):
  """All that a network needs to know of an environment."""

  observation: Nest  # ArraySpec, or a dict of them.
  num_actions: int
