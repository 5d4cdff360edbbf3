"""Many environments, each with its engine in a process of its own.

For engines that can crash, hang, block or leak. One that does is replaced while the
others go on, and no reset is waited for. See `engine_link` for the processes and
`engine_process` for what runs in them. Linux only.
"""

import collections
import pickle
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from impala_jax import types
from impala_jax.environments import base
from impala_jax.environments.engines import link as engine_link
from impala_jax.environments.engines import pooled as pooled_engine
from impala_jax.environments.engines import process as engine_process
from impala_jax.runtime import restarts

_LOOK = 0.2  # Seconds between looks at deadlines and due restarts.
_SLOWER = 3.0  # Steps that take so many times the usual are not waited for,
_GRACE = 0.02  # but so many seconds are always granted.
_COMPUTING = 0.005  # Of its time limit a step computes, or it hangs.

EngineSpec = pooled_engine.EngineSpec


class ProcessPool:
  """A `base.VectorEnvironment` of engines that may fail.

  `recv` waits for the steps under way (up to `max_ready`), not for resets, and not for
  a step that takes much longer than steps do. So it may return fewer environments than
  `max_ready`, or than all.

  Args:
    engines: one for each environment.
    task_ids: [num_envs].
    spec: of all environments.
    max_ready: the most environments that one `recv` returns, 0 for no limit.
    step_timeout: seconds; an engine that takes longer is killed and replaced. One
      that computes all the while has `reset_timeout`: some levels compile a map in
      mid-episode, and other processes may leave them little of the machine.
    reset_timeout: the same for its start and for each reset.
    max_restarts: of one environment within ten minutes.
    others: engines by task, one of which takes the place of an engine that fails too
      often; an environment for which none is left is given up. None: there are none,
      and an engine that fails too often ends the pool.
    close_timeout: seconds that engines have to close themselves.

  Raises:
    ValueError: an argument is impossible.
  """

  def __init__(
    self,
    engines: Sequence[EngineSpec],
    task_ids: Sequence[int] | np.ndarray,
    spec: types.EnvironmentSpec,
    *,
    max_ready: int = 0,
    step_timeout: float = 60.0,
    reset_timeout: float = 300.0,
    max_restarts: int = 5,
    others: Mapping[int, EngineSpec] | None = None,
    close_timeout: float = 2.0,
  ):
    self.num_envs = len(engines)
    self.spec = spec
    self.task_ids = np.array(task_ids, np.int32)
    self._specs = list(engines)
    self._limit = max_ready or self.num_envs
    self._step_timeout = step_timeout
    self._reset_timeout = reset_timeout
    self._max_restarts = max_restarts
    self._others = others
    self._unfit: set[tuple[int, int]] = set()  # Environments, and tasks they gave up.
    self._close_timeout = close_timeout
    self._check_arguments(max_ready)
    self._dtype = engine_process.slot_dtype(spec)
    self._environments = [
      pooled_engine.Engine(restarts.RestartBudget(max_restarts, at_once=True))
      for _ in engines
    ]
    self._ready: list[int] = []  # To be handed out, in the order of their arrival.
    # Steps that are waited for, by the time of their action, oldest first.
    self._prompt: dict[int, float] = {}
    self._usual = 0.0  # Seconds of a step.
    self._look_at = 0.0
    self._failures: list[base.Failure] = []
    self._failed: collections.Counter[str] = collections.Counter()
    self._restarts = 0
    self._waited = 0.0
    self._resets = 0
    self._reset_seconds = 0.0
    self._past_counts = np.zeros(len(engine_process.COUNTS), np.int64)
    self._end: base.EngineError | None = None
    self._seed: int | None = None
    self._closed = False
    self._link = engine_link.Link([self._job(e) for e in engines], self._dtype.itemsize)
    slots = np.frombuffer(self._link.memory, self._dtype)
    self._head = slots['head']
    self._action = self._head['action']
    self._observation: Any = slots['observation']
    if isinstance(spec.observation, dict):
      self._observation = {k: self._observation[k] for k in spec.observation}

  def reset(self, seed: int) -> None:
    """Starts all engines, those that run already anew."""
    self._check_open()
    self._seed = seed
    self._ready.clear()
    self._prompt.clear()
    running = [(i, e.generation) for i, e in enumerate(self._environments)]
    self._link.kill(running)
    for e in self._environments:
      e.restarts = 0
      e.waiting = e.fresh = False
    self._start(range(self.num_envs))

  def send(self, env_ids: np.ndarray, actions: np.ndarray) -> None:
    """Takes int32 `actions` [K].

    Raises:
      ValueError: an action is out of range, or an environment waits for none.
    """
    self._check_open()
    environments = self._environments
    waiting = [e.waiting for e in environments]
    ids, values = base.checked_actions(env_ids, actions, self.spec.num_actions, waiting)
    self._action[ids] = values
    now = time.monotonic()
    for i in ids:
      e = environments[i]
      e.waiting = False
      if e.state is pooled_engine.State.IDLE:
        e.sent_at = now
        if e.over:
          e.state, e.deadline = pooled_engine.State.RESETTING, now + self._reset_timeout
        else:
          e.state, e.deadline = pooled_engine.State.STEPPING, now + self._step_timeout
          e.cpu, e.extended = None, False
          self._prompt[i] = now
        self._link.command(i, e.generation)
      elif e.state is pooled_engine.State.READY:
        # The engine was replaced meanwhile: the action was for its predecessor.
        self._ready.append(i)

  def recv(self, timeout: float) -> base.Ready:
    """Returns the environments that are ready: see above for how many.

    Raises:
      TimeoutError: none became ready in time; at once where none can.
      EngineError: an engine failed too often, or its maker refused its arguments
        (`EngineMistake`), and no other level is left to play.
    """
    self._check_open()
    now = time.monotonic()
    end = now + timeout
    polled = False
    while True:
      if self._end is not None:
        raise self._end
      if now >= self._look_at:
        self._supervise(now)
      until = self._look_at if self._look_at < end else end
      if self._prompt:
        grace = self._grace()
        excused = self._excuse(now - grace)
        until = min(until, excused + grace)
      wanted = min(self._limit, len(self._ready) + len(self._prompt))
      if self._ready:
        if len(self._ready) >= wanted:
          return self._hand_out(wanted)
      elif (polled and now >= end) or all(
        e.waiting or e.state is pooled_engine.State.GIVEN_UP for e in self._environments
      ):
        raise TimeoutError(self._why_none(timeout))
      missing = max(1, wanted - len(self._ready))
      done, ended = self._link.poll(max(0.0, until - now), missing)
      polled = True
      before, now = now, time.monotonic()
      self._waited += now - before
      for i, generation in done:
        self._announced(i, generation, now)
      for engine in ended:
        self._ended(engine, now)

  def frame(self) -> np.ndarray | None:
    """The picture of environment 0, uint8 [H, W, 3], between `recv` and `send`.

    It is the observation `frame`, or the only one. None where that is no such
    picture, and before the first time step.
    """
    if not self._environments[0].waiting:
      return None
    given = self._observation
    if isinstance(given, dict):
      if 'frame' not in given:
        return None
      given = given['frame']
    picture = given.dtype == np.uint8 and given.ndim == 4 and given.shape[-1] == 3
    return given[0].copy() if picture else None

  def stats(self) -> dict[str, Any]:
    """How it went so far.

    restarts: engines that were started for failed ones.
    given_up: environments that play no more.
    failures: how many of each kind: exception, exit, signal, timeout, output (no
      time step, or not as the spec says), mistake (of the caller), keeper (the process
      that ends engines was itself ended).
    waiting: seconds that `recv` waited.
    states: of each environment, in words.
    pids: processes of the engines that run, else 0.
    """
    absent = (
      pooled_engine.State.ABSENT,
      pooled_engine.State.ENDING,
      pooled_engine.State.GIVEN_UP,
    )
    running = [e.state not in absent for e in self._environments]
    return {
      'restarts': self._restarts,
      'given_up': sum(
        e.state is pooled_engine.State.GIVEN_UP for e in self._environments
      ),
      'failures': dict(self._failed),
      'waiting': self._waited,
      'states': [e.state.value for e in self._environments],
      'pids': [int(p) for p in np.where(running, self._head['pid'], 0)],
    }

  def counts(self) -> dict[str, float]:
    """What only grows: resets, the seconds that they took, and what engines count."""
    counts = self._past_counts + self._head['counts'].sum(axis=0)
    named = zip(engine_process.COUNTS, counts.tolist(), strict=True)
    return {'resets': self._resets, 'reset_seconds': self._reset_seconds, **dict(named)}

  def close(self) -> None:
    """Ends all engines, within seconds. Idempotent."""
    if not self._closed:
      self._closed = True
      self._link.close(self._close_timeout)

  def _grace(self) -> float:
    return max(_GRACE, _SLOWER * self._usual)

  def _excuse(self, sent_before: float) -> float:
    """Waits no more for steps of older actions; the time of the oldest action left."""
    while self._prompt:
      i = next(iter(self._prompt))
      if self._prompt[i] >= sent_before:
        return self._prompt[i]
      del self._prompt[i]
    return np.inf

  def _announced(self, i: int, generation: int, now: float) -> None:
    """An environment has a new time step in its slot."""
    e = self._environments[i]
    if generation != e.generation or e.state not in pooled_engine.PHASES:
      return  # An engine that was given up.
    if e.state is pooled_engine.State.STEPPING:
      self._prompt.pop(i, None)
      # Bounded, so that one slow step does not change what is usual.
      self._usual += 0.02 * (min(now - e.sent_at, self._grace()) - self._usual)
    elif e.state is pooled_engine.State.RESETTING:
      self._resets += 1
      self._reset_seconds += now - e.sent_at
    e.state, e.deadline = pooled_engine.State.READY, np.inf
    if not e.waiting:
      self._ready.append(i)

  def _hand_out(self, count: int) -> base.Ready:
    batch, self._ready = self._ready[:count], self._ready[count:]
    ids = np.array(batch, np.int32)
    head = self._head[ids]
    observation = self._observation
    if isinstance(observation, dict):
      observation = {k: x[ids] for k, x in observation.items()}
    else:
      observation = observation[ids]
    step_type, reward, discount = head['step_type'], head['reward'], head['discount']
    episodes, restarted = [], []
    outcomes = zip(batch, step_type.tolist(), reward.tolist(), strict=True)
    for row, (i, kind, raw_reward) in enumerate(outcomes):
      e = self._environments[i]
      e.state, e.waiting = pooled_engine.State.IDLE, True
      e.over = kind == types.StepType.LAST
      if kind == types.StepType.FIRST:
        e.episode_return, e.length = 0.0, 0
      else:
        e.episode_return += raw_reward
        e.length += 1
      if e.fresh:
        e.fresh = False
        restarted.append(i)
      if e.over:
        truncated = bool(discount[row] != 0)
        task = int(self.task_ids[i])
        episodes.append(base.EpisodeEnd(task, e.episode_return, e.length, truncated, i))
    failures, self._failures = self._failures, []
    timestep = types.TimeStep(
      step_type, reward.astype(np.float32), discount, observation
    )
    return base.Ready(ids, timestep, episodes, restarted, failures)

  def _start(self, env_ids: Sequence[int]) -> None:
    assert self._seed is not None
    now = time.monotonic()
    starts = []
    for i in env_ids:
      e, spec = self._environments[i], self._specs[i]
      draw = np.random.SeedSequence([self._seed, i, e.restarts]).generate_state(1)
      e.seed = int(draw[0]) % 2**31
      e.generation += 1
      e.state, e.deadline = pooled_engine.State.STARTING, now + self._reset_timeout
      self._head['pid'][i] = 0
      self._past_counts += self._head['counts'][i]
      self._head['counts'][i] = 0
      self._head['episode_seed'][i] = engine_process.NO_SEED
      starts.append(
        engine_link.Start(i, e.generation, e.seed, spec.name, spec.shared_memory)
      )
    self._link.start(starts)

  def _supervise(self, now: float) -> None:
    """Restarts what is due and ends what has taken too long."""
    due, hung = [], []
    for i, e in enumerate(self._environments):
      if e.deadline > now:
        if (
          e.state is pooled_engine.State.STEPPING
          and e.cpu is None
          and e.deadline - now < self._step_timeout / 2
        ):
          e.cpu = pooled_engine.cpu_seconds(int(self._head['pid'][i]))
        continue
      if e.state is pooled_engine.State.ABSENT:
        e.restarts += 1
        e.fresh = True
        due.append(i)
      elif e.state is pooled_engine.State.ENDING:  # It cannot even be killed.
        self._ended(engine_link.Ended(i, e.generation, -signal.SIGKILL, None, ''), now)
      elif self._computes(i, e):
        e.extended = True
        e.deadline = e.sent_at + self._reset_timeout
      else:
        e.phase = pooled_engine.PHASES[e.state]
        e.state, e.deadline = pooled_engine.State.ENDING, now + 10.0
        self._prompt.pop(i, None)
        hung.append((i, e.generation))
    if hung:
      self._link.kill(hung)
    if due:
      self._restarts += len(due)
      self._start(due)
    self._look_at = now + _LOOK

  def _computes(self, i: int, e: pooled_engine.Engine) -> bool:
    """Whether a step that has had its time deserves more: the engine is not idle."""
    if (
      e.state is not pooled_engine.State.STEPPING
      or e.extended
      or e.cpu is None
      or self._reset_timeout <= self._step_timeout
    ):
      return False
    used = pooled_engine.cpu_seconds(int(self._head['pid'][i])) - e.cpu
    return used > _COMPUTING * self._step_timeout

  def _ended(self, ended: engine_link.Ended, now: float) -> None:
    """An engine's process is no more: there will be another."""
    i = ended.env_id
    e = self._environments[i]
    if ended.generation != e.generation or e.state in (
      pooled_engine.State.ABSENT,
      pooled_engine.State.GIVEN_UP,
    ):
      return  # One that was given up.
    in_step = e.phase == 'step' and not e.extended
    limit = self._step_timeout if in_step else self._reset_timeout
    kind, cause = pooled_engine.describe_end(
      f'{self._specs[i].name} (environment {i}',
      e,
      ended,
      limit,
      int(self._head['episode_seed'][i]),
    )
    self._failed[kind] += 1
    self._prompt.pop(i, None)
    if i in self._ready:
      self._ready.remove(i)
    pause = e.budget.spend(now)
    mistake = kind == 'mistake' and not e.restarts
    if pause is None and not mistake:
      cause = (
        f'{cause}. That is failure {e.budget.deaths} within '
        f'{restarts.WINDOW / 60:g} minutes, of which {self._max_restarts} are allowed'
      )
    failure = base.Failure(i, int(self.task_ids[i]), cause)
    e.state, e.deadline = pooled_engine.State.ABSENT, now + (pause or 0.0)
    if mistake or pause is None:
      if self._others is None:
        self._end = base.EngineMistake(cause) if mistake else base.EngineError(cause)
      else:
        failure = self._give_up(failure, e)
        if all(x.state is pooled_engine.State.GIVEN_UP for x in self._environments):
          made = base.EngineMistake if mistake else base.EngineError
          self._end = made(f'no environment is left; the last was {cause}')
    self._failures.append(failure)
    self._look_at = min(self._look_at, e.deadline)

  def _give_up(self, failure: base.Failure, e: pooled_engine.Engine) -> base.Failure:
    """Another level for an environment that cannot play its own, if one is left."""
    assert self._others is not None
    i, task = failure.env_id, failure.task_id
    self._unfit.add((i, task))
    bad = {t for _, t in self._unfit}
    playing = collections.Counter(self.task_ids.tolist())
    left = [t for t in self._others if t not in bad]
    if not left:
      e.state, e.deadline = pooled_engine.State.GIVEN_UP, np.inf
      return failure._replace(given_up=True)
    # The level with the fewest environments; of several not always the first.
    count = len(self._others)
    instead = min(left, key=lambda t: (playing[t], (t - task - i) % count))
    self._specs[i] = self._others[instead]
    self.task_ids[i] = instead
    self._link.replace_job(i, self._job(self._specs[i]))
    e.budget = restarts.RestartBudget(self._max_restarts, at_once=True)
    e.restarts = -1  # What it is refused at its first start is a mistake again.
    return failure._replace(given_up=True, instead=instead)

  def _job(self, engine: EngineSpec) -> bytes:
    return pickle.dumps(
      engine_process.Job(engine.maker, dict(engine.kwargs), self.spec)
    )

  def _why_none(self, timeout: float) -> str:
    states = collections.Counter(e.state.value for e in self._environments)
    found = ', '.join(f'{n} {state}' for state, n in states.items())
    return (
      f'none of {self.num_envs} environments became ready in {timeout:g} s: {found}'
    )

  def _check_arguments(self, max_ready: int) -> None:
    if not self._specs:
      raise ValueError('engines is empty: at least one environment is needed')
    if self.task_ids.shape != (self.num_envs,):
      raise ValueError(
        f'task_ids has shape {list(self.task_ids.shape)}: must be [{self.num_envs}]'
      )
    for name, value in (('step', self._step_timeout), ('reset', self._reset_timeout)):
      if not value > 0:
        raise ValueError(f'{name}_timeout is {value}: must be more than 0 seconds')
    for name, value in (
      ('max_ready', max_ready),
      ('max_restarts', self._max_restarts),
      ('close_timeout', self._close_timeout),
    ):
      if value < 0:
        raise ValueError(f'{name} is {value}: must be at least 0')
    for engine in (*self._specs, *(self._others or {}).values()):
      engine.check()

  def _check_open(self) -> None:
    if self._closed:
      raise RuntimeError('this ProcessPool was closed')
