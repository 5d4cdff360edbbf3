"""Where an actor's actions come from: a policy of its own, or that of a server.

The actor steps environments and builds unrolls; a `Policy` holds the parameters and
the recurrent states, and decides. `Local` runs it in the actor's process, on its CPU or
accelerator; `distributed.inference.remote` asks an inference server.
"""

from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from impala_jax import types
from impala_jax.acting import device_policy
from impala_jax.agents import agent as agent_lib
from impala_jax.distributed.control import protocol
from impala_jax.distributed.transport import protocol as transport


class Decision(NamedTuple):
  """What was decided for K environments, F of which begin an unroll here."""

  action: np.ndarray  # int32 [K]
  log_prob: np.ndarray  # float32 [K], log mu(action).
  logits: np.ndarray  # float32 [K, A]
  state: types.Nest  # [F, ...], recurrent states before this step; None for F = 0.
  version: int  # Learner updates behind the parameters that decided.


class StatesLost(Exception):
  """The recurrent states of all environments are gone; they begin anew.

  Unfinished unrolls can not be gone on with: the next decisions know nothing of what
  they hold.
  """


class Policy(Protocol):
  """Decides for the environments 0 to N - 1 of one actor. Used by one thread."""

  @property
  def version(self) -> int:
    """Learner updates behind the newest parameters in use; -1 before the first."""

  def renew(self) -> None:
    """Before unrolls begin: takes newer parameters if it is time for them.

    Raises:
      transport.TransportError: they are out of reach (after a bounded wait); asking
        again is right. Before the first success nothing can be decided.
    """

  def act(
    self,
    ids: np.ndarray,
    timestep: types.TimeStep,
    last_action: np.ndarray,
    begins: np.ndarray,
  ) -> Decision:
    """One step of the policy for some environments.

    Args:
      ids: int32 [K], distinct, which environments.
      timestep: NumPy [K, ...].
      last_action: int32 [K], what led there.
      begins: bool [K], of which the state before this step is wanted; F are true.

    Raises:
      StatesLost: see there. Asking again, with fresh unrolls, is right.
      transport.TransportError: nobody answered (after a bounded wait); the same.
    """

  def close(self) -> None:
    """Frees what is held elsewhere. Idempotent, bounded in time."""


class Local:
  """A policy of the actor's own, see `Policy`.

  Args:
    agent: the network as pure functions.
    parameters: where parameters come from.
    num_envs: N.
    unroll_length: agent steps; parameters are asked for once in the time that every
      environment makes one unroll.
    seed: of the sampling.
    batch: rows of a policy call; fewer are padded, more are several calls. 0: N.
    max_lag: updates after which the learner refuses an unroll, 0 for never. No unroll
      is begun with parameters older than a quarter of that.
    device: that runs it; None for JAX's default.
    greedy: take the likeliest action instead of sampling.
  """

  def __init__(
    self,
    agent: agent_lib.Agent,
    parameters: protocol.ParameterSource,
    num_envs: int,
    *,
    unroll_length: int,
    seed: int = 0,
    batch: int = 0,
    max_lag: int = 0,
    device: jax.Device | None = None,
    greedy: bool = False,
  ):
    self._parameters = parameters
    self._steps_between = unroll_length * num_envs
    self._max_lag = max_lag
    self._policy = device_policy.DevicePolicy(
      agent, num_envs, [batch or num_envs], device=device, seed=seed, greedy=greedy
    )
    self._steps = self._fetch_after = 0

  @property
  def version(self) -> int:
    return self._policy.version

  def renew(self) -> None:
    """See `Policy`."""
    if self.version < 0 or self._steps >= self._fetch_after:
      self._fetch(0)
    elif self._max_lag:
      self._fetch(self._max_lag // 4)

  def act(
    self,
    ids: np.ndarray,
    timestep: types.TimeStep,
    last_action: np.ndarray,
    begins: np.ndarray,
  ) -> Decision:
    """See `Policy`; it raises nothing."""
    self._steps += len(ids)
    size = self._policy.largest
    if len(ids) <= size:
      out, state = self._decide(ids, timestep, last_action, begins)
    else:
      cuts = [slice(start, start + size) for start in range(0, len(ids), size)]
      inputs = (ids, timestep, last_action, begins)
      parts = [
        self._decide(*jax.tree.map(lambda x, cut=cut: x[cut], inputs)) for cut in cuts
      ]
      out = [np.concatenate(x) for x in zip(*[p[0] for p in parts], strict=True)]
      begun = [p[1] for p in parts if p[1] is not None]
      state = jax.tree.map(lambda *x: np.concatenate(x), *begun) if begun else None
    action, log_prob, logits = out
    return Decision(action, log_prob, logits, state, self.version)

  def close(self) -> None:
    """Holds nothing elsewhere."""

  def _decide(self, *inputs: Any) -> tuple[list[np.ndarray], types.Nest]:
    return self._policy.finish(self._policy.start(*inputs))

  def _fetch(self, tolerated: int) -> None:
    """Takes the newest parameters, if they are more than `tolerated` updates ahead."""
    newer = self._parameters.fetch(self.version + tolerated)
    if newer is None and self.version < 0:
      raise transport.TransportError('the learner has no parameters yet')
    if newer is not None:
      self._policy.set_parameters(*newer)
    # Of tolerance 0: one in the time of one unroll of every environment.
    if newer is not None or not tolerated:
      self._fetch_after = self._steps + self._steps_between
