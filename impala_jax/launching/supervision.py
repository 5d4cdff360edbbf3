"""One process kept alive: its deaths, its restarts, and the end of the run.

The same in the foreground (a thread of the launcher), detached, in a job of Slurm and
in a pod (a process of its own, `launching.supervise`): the engine replaces hosts, this
replaces processes, within a budget of deaths and with growing pauses.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from impala_jax.distributed.roles import run as roles
from impala_jax.launching import processes
from impala_jax.launching import program as program_lib
from impala_jax.runtime import files, lease, restarts
from impala_jax.runtime.run_directory import RunDirectory, process_name

_TICK = 0.25
_LOOK = 2.0  # Seconds between looks at the shared directory.
_ALL = {'actor': 'actors', 'inference': 'inference servers'}
_END_TIMEOUT = 60.0  # For the learner to say that the run ended, after a role did.


@dataclasses.dataclass(frozen=True)
class Settings:
  """How one process is looked after.

  Attributes:
    role: its name.
    command: that is run.
    index: of the process within the role.
    index_from: variable of the environment to be added to `index`.
    once: ends as the process ends: one of a gang, which is kept as a whole.
    first_incarnation: the process has at least this one.
    max_restarts: within `window`; one more death is the last.
    window: seconds in which deaths count.
    grace: seconds from the stop signal to SIGKILL.
    linger: seconds that the process may go on after the run has ended.
    patience: seconds that a client waits for a learner.
    essential: the run ends with this process.
    stop_signal: that ends the process in order; srun answers SIGTERM with SIGKILL for
      its tasks.
    slurm_host: IMPALA_HOST is the address by which Slurm knows the node.
  """

  role: str
  command: tuple[str, ...]
  index: int = 0
  index_from: str = ''
  once: bool = False
  first_incarnation: int = 0
  max_restarts: int = 5
  window: float = restarts.WINDOW
  grace: float = 30.0
  linger: float = 0.0
  patience: float = 43_200.0
  essential: bool = False
  stop_signal: str = 'SIGTERM'
  slurm_host: bool = False

  @property
  def follows(self) -> bool:
    """Whether this is a client of the learner."""
    return self.role in ('actor', 'inference', 'evaluator')

  def arguments(self) -> list[str]:
    """Those of `launching.supervise` that say the same, whatever its defaults are."""
    flags = []
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name in ('role', 'command') or value is False or value == '':
        continue
      number = f'{value:g}' if isinstance(value, float) else value
      flags.append(f'--{field.name}' + ('' if value is True else f'={number}'))
    return [self.role, *flags, '--', *self.command]


def settings_of(
  program: program_lib.Program,
  role: program_lib.Role,
  python: str,
  index: int = 0,
  **changes: Any,
) -> Settings:
  """How a backend has a role's process looked after; `changes` are its own."""
  common = Settings(
    role=role.name,
    command=(python, *role.argv),
    index=index,
    first_incarnation=program.first_incarnation,
    max_restarts=role.restart.max_restarts,
    window=role.restart.window,
    grace=role.grace,
    linger=role.linger,
    essential=role.restart.essential,
  )
  return dataclasses.replace(common, **changes)


def command(python: str, settings: Settings) -> list[str]:
  """The command that looks after a process from a process of its own."""
  return [python, '-m', 'impala_jax.launching.supervise', *settings.arguments()]


class Supervised:
  """See the module.

  Args:
    settings: of this process.
    run: directory of the run.
    on_limit: called after the process has ended because of SIGUSR1: the job's time
      limit is near, and it should go on later, perhaps elsewhere.
    say: gets a line for people when something happens.

  Attributes:
    state: 'waiting', 'running', 'restarting', 'done', 'stopped' or 'failed'.
    words: that go with it, such as the cause.
    restarts: how often the process was started again.
    killed: whether it did not end in order when it was told to.
    broken: whether looking after it has failed; then nothing runs.
  """

  def __init__(
    self,
    settings: Settings,
    run: RunDirectory,
    on_limit: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
  ):
    self.settings = settings
    self.state, self.words = 'waiting', ''
    self.restarts = 0
    self.killed = self.broken = False
    self._run = run
    self._on_limit = on_limit
    self._print = say
    self._budget = restarts.RestartBudget(settings.max_restarts, settings.window)
    self._stop = ''  # The signal that asked for it.
    self._lost = ''  # Why there is no more reason to wait for the learner.
    # The learner's newest sign of life, and when it was seen.
    self._sign: tuple[int, float] = (0, time.monotonic())
    self._child: subprocess.Popen[bytes] | None = None
    self._record = run.supervised(settings.role, settings.index)
    self._log = run.log(settings.role, settings.index)
    before = run.incarnation(settings.role, settings.index)
    self._incarnation = max(settings.first_incarnation - 1, before)
    # The run's main process is what its owner lives by.
    self._heart = (
      lease.Heart(run, lease.launch_of(settings.first_incarnation))
      if settings.essential and not settings.index
      else None
    )

  @property
  def name(self) -> str:
    return process_name(self.settings.role, self.settings.index)

  def install_signals(self) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
      signal.signal(number, lambda n, _: self.stop(signal.Signals(n).name))
    signal.signal(signal.SIGINT, signal.SIG_IGN)

  def stop(self, why: str) -> None:
    """Ends the process in order. May be called from any thread."""
    self._stop = why

  @property
  def halted(self) -> int:
    """The process's id where a signal has stopped it, as SIGSTOP does; else 0."""
    child = self._child
    if child is None or child.returncode is not None:
      return 0
    try:
      status = psutil.Process(child.pid).status()
    except psutil.Error:
      return 0
    return child.pid if status == psutil.STATUS_STOPPED else 0

  def kill(self) -> None:
    """Ends the process at once, as a failure. May be called from any thread."""
    child = self._child
    if child is not None and child.poll() is None:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)

  def run(self) -> int:
    """Returns the exit code: 0 when the run or the reason to run has ended.

    Where looking after the process fails (on a full disk, say) it ends both.
    """
    try:
      with self._heart or contextlib.nullcontext():
        return self._look_after()
    except Exception as e:
      words = files.explain(e) if isinstance(e, OSError) else f'{type(e).__name__}: {e}'
      self.state, self.words = 'failed', f'could not be looked after: {words}'
      self.broken = True
    with contextlib.suppress(Exception):
      self._end_child()
    self.kill()
    with contextlib.suppress(Exception):
      self._run.end('failed', f'{self.name} {self.words}')
    with contextlib.suppress(Exception):
      self._say(self.words)
    return 1

  def _look_after(self) -> int:
    settings = self.settings
    while True:
      if words := self._superseded():
        # Nothing is written: what stands there is the other's.
        self.state, self.words = 'failed', words
        self._say(words)
        return 1
      if self._stop or self._how_ended():
        return self._leave('done', self._stop or self._how_ended())
      self._start()
      code = self._watch()
      if self._superseded():
        continue
      if self._stop:
        return self._leave('stopped', self._stop)
      if settings.once and code:
        words = self._explain(code)
        self._print(f'CAUSE: {words}')
        code = roles.MISTAKE if code == roles.MISTAKE else 1
        return self._leave('failed', words, code=code)
      if self._lost:
        return self._leave('failed', self._lost, code=1)
      if code == 0:
        if settings.essential:
          self._run.end('finished')
        if settings.once:
          return self._leave('done', 'ended')
        if self._how_ended(_END_TIMEOUT):
          return self._leave('done', self._how_ended())
        self._say('ended although the run goes on')
        self._pause(1.0)
        continue
      words = self._explain(code)
      pause = None if code == roles.MISTAKE else self._budget.spend()
      if pause is None:
        if code != roles.MISTAKE:
          words = f'{words} ({self._budget.deaths} deaths)'
        if settings.essential:
          self._run.end('failed', f'{settings.role} {words}')
        return self._leave('failed', words, code=1)
      self._say(words)
      self._write('restarting', words)
      self._pause(pause)

  def _superseded(self) -> str:
    """Why this is no longer the one that looks after the process; else empty."""
    settings = self.settings
    if lease.superseded(self._run, lease.launch_of(settings.first_incarnation)):
      return 'the run directory belongs to a newer launch'
    newest = self._run.incarnation(settings.role, settings.index)
    if self._heart is not None and newest > self._incarnation:
      return 'another supervisor has started the process again'
    return ''

  def _explain(self, code: int) -> str:
    return f'{processes.explain_exit(code)}: {processes.cause(self._log)}'

  def _start(self) -> None:
    settings = self.settings
    self.restarts += self._child is not None
    self._incarnation += 1
    if settings.once:  # Those of a gang are this process's, too.
      self.restarts = self._incarnation - settings.first_incarnation
    # Before the process, so that no other may ever get the same number.
    self._write('running')
    environment = processes.environment_of(
      self._run,
      settings.role,
      settings.index,
      self._incarnation,
      # A client looks for a learner that moved, and waits for one that is away.
      settings.patience if settings.follows else None,
    )
    self._log.parent.mkdir(exist_ok=True)
    with open(self._log, 'ab') as log, _usr1_blocked():
      self._child = subprocess.Popen(
        settings.command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
      )

  def _watch(self) -> int:
    """Until the process has ended, by itself or because it had to; its exit code."""
    assert self._child is not None
    settings = self.settings
    look = 0.0
    leave_at = None
    while True:
      try:
        return self._child.wait(_TICK)
      except subprocess.TimeoutExpired:
        pass
      now = time.monotonic()
      if self._stop or (leave_at is not None and now >= leave_at):
        self._end_child()
        return 0
      if now < look:
        continue
      look = now + _LOOK
      if self._superseded():
        self.kill()
        return self._child.wait()
      if leave_at is None and self._how_ended():
        leave_at = now + settings.linger
        self._wake()
      if settings.essential:
        for role in ('actor', 'inference'):
          self._end_if_all_failed(role)
      if settings.follows and self._learner_is_lost(now):
        self._lost = f'no learner for {settings.patience:.0f} s'
        self._end_child()
        return 0

  def _end_child(self) -> None:
    child = self._child
    assert child is not None
    child.send_signal(signal.Signals[self.settings.stop_signal])
    self._wake()
    try:
      child.wait(self.settings.grace)
    except subprocess.TimeoutExpired:
      self.killed = True
      self._say(f'did not end within {self.settings.grace:.0f} s: killed')
    # Engines of environments, too.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(child.pid, signal.SIGKILL)
    child.wait()

  def _wake(self) -> None:
    """One that a signal has stopped hears of the end only when it goes on."""
    assert self._child is not None
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._child.pid, signal.SIGCONT)

  def _end_if_all_failed(self, role: str) -> None:
    """Without any actor, or any server for them, the learner would wait for ever."""
    launch = files.read_json(self._run.launch)
    roles = launch.get('program', {}).get('roles', [])
    count = sum(r['replicas'] for r in roles if r['name'] == role)
    last: dict[str, Any] = {}
    for index in range(count):
      last = files.read_json(self._run.supervised(role, index))
      if last.get('state') != 'failed':
        return
    if count:
      self._run.end('failed', f'all {_ALL[role]}; the last one {last["words"]}')

  def _learner_is_lost(self, now: float) -> bool:
    # Clocks of hosts differ: what counts is how long the file has not changed.
    try:
      sign = self._run.status.stat().st_mtime_ns
    except OSError:
      sign = 0
    if sign != self._sign[0]:
      self._sign = (sign, now)
    return now - self._sign[1] > self.settings.patience

  def _how_ended(self, timeout: float = 0.0) -> str:
    """How the run ended, in words; empty if it goes on."""
    deadline = time.monotonic() + timeout
    while True:
      if ended := self._run.how_ended():
        return f'the run {ended.get("reason")} {ended.get("cause", "")}'.strip()
      if self._stop or time.monotonic() >= deadline:
        return ''
      time.sleep(_TICK)

  def _pause(self, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not self._stop:
      time.sleep(_TICK)

  def _leave(self, state: str, words: str, code: int = 0) -> int:
    self._say(words)
    self._write(state, words)
    if self._stop == 'SIGUSR1' and not self.settings.once:
      self._on_limit()
    return code

  def _write(self, state: str, words: str = '') -> None:
    self.state, self.words = state, words
    self._record.parent.mkdir(exist_ok=True)
    files.write_json(
      self._record,
      {
        'role': self.settings.role,
        'index': self.settings.index,
        'host': os.environ.get('SLURMD_NODENAME') or socket.gethostname(),
        'incarnation': self._incarnation,
        'restarts': self.restarts,
        'state': state,
        'words': words,
        'time': time.time(),
      },
    )

  def _say(self, words: str) -> None:
    self._print(f'{self.settings.role} {self.settings.index}: {words}')


@contextlib.contextmanager
def _usr1_blocked() -> Iterator[None]:
  """What is started meanwhile never gets SIGUSR1, nor do its children.

  Slurm signals every process of a step; this one is the supervisor's business. A
  function between fork and exec would do, too, but not in a process of many threads.
  """
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
