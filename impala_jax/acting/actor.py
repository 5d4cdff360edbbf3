"""The actor: many environments, a batched policy, unrolls written in place.

Each environment owns one row of bytes (`unroll_layout`). Every time step is
written where it belongs in that row; a full row is sealed and sent, and its last
time step becomes the first of the next unroll. Environments move at their own
pace: whichever are ready are served together, by whatever `policy.Policy` there is.
"""

import collections
import functools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from impala_jax import types, unroll_layout
from impala_jax.acting import patience as patience_lib
from impala_jax.acting import policy as policy_lib
from impala_jax.acting import stages
from impala_jax.distributed.transport import protocol as transport
from impala_jax.environments import base


class Actor:
  """Runs a behaviour policy and sends its unrolls.

  Args:
    policy: what decides, for as many environments; closed by whoever made it.
    environment: all environments of this actor.
    layout: of the rows that `writer` takes.
    writer: the way to the learner.
    unroll_length: T.
    actor_id: unique among the actors of a run.
    incarnation: changes when an actor restarts, so that sequences begin anew.
    seed: of the environments; each actor needs its own.
    send_logits: the layout has behaviour logits.
    should_stop: asked at least every second; ends `run`.
    patience: seconds without the learner, or without the inference server that decides,
      after which the actor gives up.
    environment_patience: seconds without any environment after which it does.
  """

  def __init__(
    self,
    policy: policy_lib.Policy,
    environment: base.VectorEnvironment,
    layout: unroll_layout.UnrollLayout,
    writer: transport.Writer,
    *,
    unroll_length: int,
    actor_id: int = 0,
    incarnation: int = 0,
    seed: int = 0,
    send_logits: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    patience: float = 120.0,
    environment_patience: float = 120.0,
  ):
    self._policy = policy
    self._environment = environment
    self._layout = layout
    self._writer = writer
    self._length = unroll_length
    self._actor_id = actor_id
    self._incarnation = incarnation
    self._seed = seed
    self._send_logits = send_logits
    self._should_stop = should_stop
    self._environment_patience = environment_patience
    self._retry = patience_lib.Patience(f'actor {actor_id}', patience, should_stop).call

    count = environment.num_envs
    self._started = False
    self._rows = layout.allocate(count)
    self._views = layout.views(self._rows)
    self._position = np.zeros(count, np.int64)  # Next step to write in each row.
    self._row_version = np.zeros(count, np.int64)
    self._sequence = 0
    self._last_action = np.zeros(count, np.int32)

    self.agent_steps = 0
    self.unrolls_sent = 0
    # Unfinished, of engines that failed, or of an inference server that went away.
    self.unrolls_dropped = 0
    self.episodes: collections.deque[base.EpisodeEnd] = collections.deque(maxlen=10_000)
    self.failures: collections.deque[base.Failure] = collections.deque(maxlen=1_000)
    # Wall seconds of `run` by stage; `learner` is time that the queue or a missing
    # learner held the actor back, `inference` is spent on the policy or on waiting for
    # the server that runs it. They add up: `other` is what no stage claims.
    self.seconds = dict.fromkeys(stages.STAGES, 0.0)

  @property
  def version(self) -> int:
    """Learner updates behind the parameters in use."""
    return self._policy.version

  def run(self, max_unrolls: int | None = None) -> None:
    """Steps until `should_stop`, or until `max_unrolls` more were sent.

    Raises:
      transport.TransportError: the learner, or the inference server, stayed away for
        `patience` seconds.
      TimeoutError: no environment became ready for `environment_patience` seconds,
        or the queue stayed full, see `patience.Patience`.
      environments.base.EngineError: an engine failed too often.
    """
    goal = None if max_unrolls is None else self.unrolls_sent + max_unrolls
    start, before = time.perf_counter(), sum(self.seconds.values())
    try:
      if not self._started:
        self._renew()
        self._environment.reset(self._seed)
        self._started = True
        start, before = time.perf_counter(), sum(self.seconds.values())
      while goal is None or self.unrolls_sent < goal:
        self.step()
        claimed = sum(self.seconds.values()) - before
        self.seconds['other'] += time.perf_counter() - start - claimed
    except patience_lib.Stopped:
      pass

  def step(self) -> None:
    """Serves the environments that are ready: one policy call."""
    clock = time.perf_counter
    start = clock()
    ready = self._recv()
    t_environment = clock()
    ids = ready.env_ids
    self.failures.extend(ready.failures)
    gone = [f.env_id for f in ready.failures if f.given_up and f.instead < 0]
    self._drop([*ready.restarted, *gone])
    self._write_timestep(ids, ready.timestep)
    full = ids[self._position[ids] == self._length]
    t_pack = clock()
    if len(full):
      self._send(full)
    # The first time step of every unroll needs the state before it.
    if not self._position[ids].all():
      self._renew()
    t_send = clock()
    decision = self._decide(ids, ready.timestep)
    t_inference = clock()
    position = self._position[ids]
    self._views.action[ids, position] = decision.action
    self._views.behaviour_log_prob[ids, position] = decision.log_prob
    if self._send_logits:
      assert self._views.behaviour_logits is not None
      self._views.behaviour_logits[ids, position] = decision.logits
    self._last_action[ids] = decision.action
    self._position[ids] += 1
    self._environment.send(ids, decision.action)
    self.agent_steps += len(ids)
    self.episodes.extend(ready.episodes)
    self.seconds['environment'] += t_environment - start
    self.seconds['inference'] += t_inference - t_send
    self.seconds['pack'] += t_pack - t_environment + clock() - t_inference

  def _recv(self) -> base.Ready:
    deadline = time.monotonic() + self._environment_patience
    while True:
      if self._should_stop():
        raise patience_lib.Stopped
      try:
        return self._environment.recv(timeout=1.0)
      except TimeoutError:
        if time.monotonic() > deadline:
          raise TimeoutError(
            f'no environment of actor {self._actor_id} became ready in '
            f'{self._environment_patience:.0f} s'
          ) from None

  def _write_timestep(self, ids: np.ndarray, timestep: types.TimeStep) -> None:
    position = self._position[ids]

    def write(view: np.ndarray, x: np.ndarray) -> None:
      view[ids, position] = x

    jax.tree.map(write, self._views.timestep, timestep)

  def _drop(self, restarted: Sequence[int]) -> None:
    """Forgets the unfinished unrolls of environments whose engine was replaced.

    Their last time steps are already sent where an unroll was whole, so what is lost
    is less than one unroll each.
    """
    for env_id in restarted:
      self.unrolls_dropped += int(self._position[env_id] > 0)
      self._position[env_id] = 0

  def _send(self, full: np.ndarray) -> None:
    """Seals and sends complete rows, and makes their last step the next first."""
    before = time.perf_counter()
    for env_id in full:
      row = self._rows[env_id]
      self._layout.seal(
        row,
        actor_id=self._actor_id,
        incarnation=self._incarnation,
        sequence=self._sequence,
        version=int(self._row_version[env_id]),
        env_id=int(env_id),
        task_id=int(self._environment.task_ids[env_id]),
      )
      self._sequence += 1
      self._retry(functools.partial(self._writer.write, row, timeout=1.0))
      self.unrolls_sent += 1
    for view in jax.tree.leaves(self._views.timestep):
      view[full, 0] = view[full, self._length]
    self._position[full] = 0
    self.seconds['learner'] += time.perf_counter() - before

  def _decide(self, ids: np.ndarray, timestep: types.TimeStep) -> policy_lib.Decision:
    """The policy's decision, with which fresh unrolls are begun."""
    while True:
      begins = self._position[ids] == 0
      last_action = self._last_action[ids]
      try:
        decision = self._retry(
          functools.partial(self._policy.act, ids, timestep, last_action, begins),
          'inference server',
        )
        break
      except policy_lib.StatesLost:
        self._begin_anew(ids)
    if begins.any():
      self._begin_unrolls(ids[begins], last_action[begins], decision)
    return decision

  def _begin_unrolls(
    self, ids: np.ndarray, last_action: np.ndarray, decision: policy_lib.Decision
  ) -> None:
    def write(view: np.ndarray, state: np.ndarray) -> None:
      view[ids] = state

    jax.tree.map(write, self._views.agent_state, decision.state)
    self._views.last_action[ids] = last_action
    self._views.task_id[ids] = self._environment.task_ids[ids]
    self._row_version[ids] = decision.version

  def _begin_anew(self, ids: np.ndarray) -> None:
    """Drops all unfinished unrolls; the newest time step of `ids` begins their next."""
    self.unrolls_dropped += int(np.count_nonzero(self._position))
    position = self._position[ids]
    for view in jax.tree.leaves(self._views.timestep):
      view[ids, 0] = view[ids, position]
    # Of the others the next time step that comes.
    self._position[:] = 0

  def _renew(self) -> None:
    before = time.perf_counter()
    self._retry(self._policy.renew)
    self.seconds['parameters'] += time.perf_counter() - before
