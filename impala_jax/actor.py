"""The actor: many environments, one batched policy, unrolls written in place.

Each environment owns one row of bytes (`unroll_layout`). Every time step is
written where it belongs in that row; a full row is sealed and sent, and its last
time step becomes the first of the next unroll. Environments move at their own
pace: whichever are ready are served together.
"""

import collections
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from impala_jax import patience as patience_lib
from impala_jax import policy_call, types, unroll_layout
from impala_jax.agents import agent as agent_lib
from impala_jax.distributed import transport
from impala_jax.environments import base

STAGES = ('environment', 'inference', 'pack', 'learner', 'parameters', 'other')


class ParameterSource(Protocol):
  """Where an actor gets parameters from."""

  def fetch(self, have_version: int) -> tuple[int, types.Nest] | None:
    """The newest (version, parameters), or None where `have_version` is newest.

    A learner that came back from a checkpoint gives a lower version than before.

    Raises:
      transport.TransportError: out of reach (after a bounded wait).
    """


class Actor:
  """Runs a behaviour policy and sends its unrolls.

  Args:
    agent: the network as pure functions.
    environment: all environments of this actor.
    layout: of the rows that `writer` takes.
    writer: the way to the learner.
    parameters: where parameters come from.
    unroll_length: T.
    actor_id: unique among the actors of a run.
    incarnation: changes when an actor restarts, so that sequences begin anew.
    seed: of the environments and of the sampling; each actor needs its own.
    inference_batch: rows of a policy call; fewer are padded. 0: all environments.
    send_logits: the layout has behaviour logits.
    should_stop: asked at least every second; ends `run`.
    max_lag: updates after which the learner refuses an unroll, 0 for never. No unroll
      is begun with parameters older than a quarter of that.
    patience: seconds without the learner after which the actor gives up.
    environment_patience: seconds without any environment after which it does.
  """

  def __init__(
    self,
    agent: agent_lib.Agent,
    environment: base.VectorEnvironment,
    layout: unroll_layout.UnrollLayout,
    writer: transport.Writer,
    parameters: ParameterSource,
    *,
    unroll_length: int,
    actor_id: int = 0,
    incarnation: int = 0,
    seed: int = 0,
    inference_batch: int = 0,
    send_logits: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    max_lag: int = 0,
    patience: float = 120.0,
    environment_patience: float = 120.0,
  ):
    self._environment = environment
    self._layout = layout
    self._writer = writer
    self._parameters = parameters
    self._length = unroll_length
    self._actor_id = actor_id
    self._incarnation = incarnation
    self._seed = seed
    self._send_logits = send_logits
    self._max_lag = max_lag
    self._should_stop = should_stop
    self._environment_patience = environment_patience
    self._retry = patience_lib.Patience(f'actor {actor_id}', patience, should_stop).call

    count = environment.num_envs
    self._batch = inference_batch or count
    self._rows = layout.allocate(count)
    self._views = layout.views(self._rows)
    self._position = np.zeros(count, np.int64)  # Next step to write in each row.
    self._row_version = np.zeros(count, np.int64)
    self._sequence = 0
    # One more row than environments: padding is read from and written to it.
    self._state = agent.initial_state(count + 1)
    self._last_action = np.zeros(count + 1, np.int32)
    self._key = jax.random.key(seed)
    self._version = -1
    self._params: types.Nest = None
    self._fetch_after = 0
    self._act = policy_call.make(agent.step)

    self.agent_steps = 0
    self.unrolls_sent = 0
    self.unrolls_dropped = 0  # Unfinished, of engines that failed.
    self.episodes: collections.deque[base.EpisodeEnd] = collections.deque(maxlen=10_000)
    self.failures: collections.deque[base.Failure] = collections.deque(maxlen=1_000)
    # Wall seconds of `run` by stage; `learner` is time that the queue or a missing
    # learner held the actor back. They add up: `other` is what no stage claims.
    self.seconds = dict.fromkeys(STAGES, 0.0)

  @property
  def version(self) -> int:
    """Learner updates behind the parameters in use."""
    return self._version

  def run(self, max_unrolls: int | None = None) -> None:
    """Steps until `should_stop`, or until `max_unrolls` more were sent.

    Raises:
      transport.TransportError: the learner stayed away for `patience` seconds.
      TimeoutError: no environment became ready for `environment_patience` seconds,
        or the queue stayed full, see `patience.Patience`.
      environments.base.EngineError: an engine failed too often.
    """
    goal = None if max_unrolls is None else self.unrolls_sent + max_unrolls
    start, before = time.perf_counter(), sum(self.seconds.values())
    try:
      if self._params is None:
        self._fetch()
        self._environment.reset(self._seed)
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
    self._drop(ready.restarted)
    self._write_timestep(ids, ready.timestep)
    full = ids[self._position[ids] == self._length]
    t_pack = clock()
    # The first time step of every unroll needs the state before it.
    fresh = ids[self._position[ids] == 0]
    if len(full):
      self._send(full)
      fresh = np.concatenate([fresh, full])
    if len(fresh):
      self._renew()
    t_send = clock()
    if len(fresh):
      self._begin_unrolls(fresh)
    action, log_prob, logits = self._infer(ids, ready.timestep)
    t_inference = clock()
    position = self._position[ids]
    self._views.action[ids, position] = action
    self._views.behaviour_log_prob[ids, position] = log_prob
    if self._send_logits:
      assert self._views.behaviour_logits is not None
      self._views.behaviour_logits[ids, position] = logits
    self._last_action[ids] = action
    self._position[ids] += 1
    self._environment.send(ids, action)
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

  def _begin_unrolls(self, ids: np.ndarray) -> None:
    def write(view: np.ndarray, state: jax.Array) -> None:
      view[ids] = np.asarray(state)[ids]

    jax.tree.map(write, self._views.agent_state, self._state)
    self._views.last_action[ids] = self._last_action[ids]
    self._views.task_id[ids] = self._environment.task_ids[ids]
    self._row_version[ids] = self._version

  def _infer(self, ids: np.ndarray, timestep: types.TimeStep) -> Any:
    if len(ids) > self._batch:
      cut = self._batch
      parts = [
        self._infer(ids[part], jax.tree.map(lambda x, part=part: x[part], timestep))
        for part in (slice(cut), slice(cut, None))
      ]
      return [np.concatenate(x) for x in zip(*parts, strict=True)]
    count = len(ids)
    ids, timestep = policy_call.padded(
      ids, timestep, self._batch, self._environment.num_envs
    )
    self._key, self._state, out = self._act(
      self._params, self._key, self._state, ids, timestep, self._last_action[ids]
    )
    return [np.asarray(x)[:count] for x in out]

  def _renew(self) -> None:
    """Before unrolls begin: newer parameters, if it is time or these are old."""
    if self.agent_steps >= self._fetch_after:
      self._fetch()
    elif self._max_lag:
      self._fetch(tolerated=self._max_lag // 4)

  def _fetch(self, tolerated: int = 0) -> None:
    """Takes the newest parameters, if they are more than `tolerated` updates ahead."""
    before = time.perf_counter()

    def call() -> tuple[int, types.Nest] | None:
      newer = self._parameters.fetch(self._version + tolerated)
      if newer is None and self._params is None:
        raise transport.TransportError('the learner has no parameters yet')
      return newer

    newer = self._retry(call)
    if newer is not None:
      self._version, params = newer
      # On this process's device once, rather than at every policy call.
      self._params = jax.device_put(params)
    # Of tolerance 0: one in the time of one unroll of every environment.
    if newer is not None or not tolerated:
      self._fetch_after = self.agent_steps + self._length * self._environment.num_envs
    self.seconds['parameters'] += time.perf_counter() - before
