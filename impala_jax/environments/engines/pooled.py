"""One environment of a `process_pool`: what it is made of, its state, and its ends."""

import contextlib
import dataclasses
import enum
import signal
from collections.abc import Mapping
from typing import Any

import numpy as np
import psutil

from impala_jax.environments.engines import link as engine_link
from impala_jax.environments.engines import process as engine_process
from impala_jax.runtime import files, restarts


@dataclasses.dataclass(frozen=True)
class EngineSpec:
  """What a process of the pool makes its environment with.

  The process works in the caller's directory and can import what the caller can. Its
  TMPDIR is its own, and removed with it.

  Attributes:
    maker: `package.module:function`, called in the process with `seed`, an int in
      [0, 2^31), and `kwargs`. It returns a `dm_env.Environment` whose attribute
      `episode_seed`, where there is one, is named when a step fails. Where it has an
      attribute `on_episode_seed`, that is set to a function which the environment
      calls with an episode's seed before its engine begins it, so that the seed can be
      named when that ends the process. What the maker raises of ValueError, TypeError,
      ImportError and AttributeError is taken for a mistake of the caller.
    kwargs: can be pickled.
    name: for errors, for example the level.
    shared_memory: prefixes of the names that the engine makes in /dev/shm, to be
      removed when it could not do so.
  """

  maker: str
  kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  name: str = 'environment'
  shared_memory: tuple[str, ...] = ()

  def check(self) -> None:
    """Raises ValueError where `maker` cannot be a name."""
    module, _, function = self.maker.partition(':')
    if not (module and function):
      raise ValueError(
        f'maker of {self.name} is {self.maker!r}: must be package.module:function'
      )


class State(enum.Enum):
  """Of an environment; the value is for people."""

  ABSENT = 'waits to be restarted'
  STARTING = 'starting'
  RESETTING = 'in reset'
  STEPPING = 'in step'
  READY = 'has a time step'
  IDLE = 'waits for an action'
  ENDING = 'being killed'
  GIVEN_UP = 'given up'


# What an engine is busy with.
PHASES = {State.STARTING: 'start', State.RESETTING: 'reset', State.STEPPING: 'step'}


@dataclasses.dataclass(slots=True)
class Engine:
  """What a pool knows of one environment and the engine that it has now."""

  budget: restarts.RestartBudget
  state: State = State.ABSENT
  generation: int = 0  # Of its engine: how many there were.
  restarts: int = 0  # Since `reset`.
  seed: int = 0
  waiting: bool = False  # The caller owes an action.
  over: bool = True  # The time step handed out last was LAST.
  fresh: bool = False  # The caller has not been told of this engine.
  episode_return: float = 0.0  # Of the episode so far.
  length: int = 0
  sent_at: float = 0.0
  deadline: float = np.inf  # Of what it does; of being started, where ABSENT.
  phase: str = ''  # What it took too long for, where ENDING.
  cpu: float | None = None  # Seconds it had computed when half its time was over.
  extended: bool = False  # Its step computes, and has the time of a reset.


def cpu_seconds(pid: int) -> float:
  """Of a process and all that it has started; 0 for one that is gone."""
  total = 0.0
  try:
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
  except (psutil.Error, ValueError):
    return total
  for process in family:
    with contextlib.suppress(psutil.Error):
      total += sum(process.cpu_times()[:4])  # Of children that have ended, too.
  return total


def describe_end(
  name: str,
  engine: Engine,
  ended: engine_link.Ended,
  limit: float,
  episode_seed: int,
) -> tuple[str, str]:
  """The kind of an engine's end, and its cause in words.

  Args:
    name: of the environment, with a bracket left open.
    engine: as it was when its process ended.
    ended: what its keeper says.
    limit: seconds that it had, if it was killed for being slow.
    episode_seed: that in its slot.
  """
  report = ended.report or {}
  if engine.state is State.ENDING:
    kind, phase = 'timeout', engine.phase
    how = f'no answer in {limit:g} s'
  else:
    kind = report.get('kind', 'signal' if ended.status < 0 else 'exit')
    phase = report.get('phase') or PHASES.get(engine.state, 'between steps')
    how = report.get('text') or _exit(ended.status)
  seeds = f'seed {engine.seed}'
  seed = report.get('episode_seed', episode_seed)
  if seed != engine_process.NO_SEED:
    seeds += f', episode seed {seed}'
  cause = f'{name}, {seeds}): {how} ({phase})'
  if ended.output and not report:
    cause += f'; its last output: {ended.output}'
  return kind, cause


def _exit(status: int) -> str:
  if status >= 0:
    return f'its process ended with exit code {status}'
  try:
    words = f'its process was ended by {signal.Signals(-status).name}'
    full = files.what_is_full() if status == -signal.SIGBUS else ''
    return f'{words}, for {full}' if full else words
  except ValueError:
    return f'its process was ended by signal {-status}'
