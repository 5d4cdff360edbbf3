"""One process kept alive: its deaths, its restarts, and the end of the run."""

import collections
import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

from impala_jax.launching import run_records
from impala_jax.launching import supervisor as supervisor_lib
from impala_jax.runtime import files

_TICK = 0.25
_LOOK = 2.0  # Seconds between looks at the shared directory.
_ALL = {'actor': 'actors', 'inference': 'inference servers'}
_END_TIMEOUT = 60.0  # For the learner to say that the run ended, after a role did.


@dataclasses.dataclass(frozen=True)
class Settings:
  """See the flags of `impala_jax.launching.supervise`."""

  role: str
  index: int
  command: tuple[str, ...]
  run_dir: pathlib.Path
  first_incarnation: int = 0
  max_restarts: int = 5
  window: float = 600.0
  grace: float = 30.0
  linger: float = 0.0
  patience: float = 43_200.0
  essential: bool = False
  once: bool = False
  stop_signal: signal.Signals = signal.SIGTERM

  @property
  def follows(self) -> bool:
    """Whether this is a client of the learner."""
    return self.role in ('actor', 'inference', 'evaluator')

  @property
  def record(self) -> pathlib.Path:
    return run_records.record_path(self.run_dir, self.role, self.index)


class Supervised:
  """See the module.

  Args:
    settings: of this process.
    on_limit: called after the process has ended because of SIGUSR1: the job's time
      limit is near, and it should go on later, perhaps elsewhere.
  """

  def __init__(self, settings: Settings, on_limit: Callable[[], None] = lambda: None):
    self._settings = settings
    self._on_limit = on_limit
    self._stop = ''  # The signal that asked for it.
    self._lost = ''  # Why there is no more reason to wait for the learner.
    self._deaths: collections.deque[float] = collections.deque()
    self._restarts = 0
    # The learner's newest sign of life, and when it was seen.
    self._sign: tuple[int, float] = (0, time.monotonic())
    self._child: subprocess.Popen[bytes] | None = None
    before = files.read_json(settings.record)
    self._incarnation = max(
      settings.first_incarnation - 1, int(before.get('incarnation', -1))
    )

  def install_signals(self) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
      signal.signal(number, self._on_signal)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

  def stop(self, why: str) -> None:
    """Ends the process in order. May be called from any thread."""
    self._stop = why

  def kill(self) -> None:
    """Ends the process at once, as a failure. May be called from any thread."""
    child = self._child
    if child is not None and child.poll() is None:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)

  def run(self) -> int:
    """Returns the exit code: 0 when the run or the reason to run has ended."""
    while True:
      if self._stop or self._ended():
        return self._leave('done', self._stop or self._ended())
      self._start()
      code = self._watch()
      if self._stop:
        return self._leave('stopped', self._stop)
      if self._settings.once and code:
        words = self._explain(code)
        print(f'CAUSE: {words}', flush=True)
        return self._leave('failed', words, code=1)
      if self._settings.once:
        if self._settings.essential:
          run_records.end_run(self._settings.run_dir, 'finished')
        return self._leave('done', 'ended')
      if self._lost:
        return self._leave('failed', self._lost, code=1)
      if code == 0:
        if self._settings.essential:
          run_records.end_run(self._settings.run_dir, 'finished')
        if self._ended(_END_TIMEOUT):
          return self._leave('done', self._ended())
        self._say('ended although the run goes on')
        self._pause(1.0)
        continue
      words = self._explain(code)
      now = time.monotonic()
      self._deaths.append(now)
      while now - self._deaths[0] > self._settings.window:
        self._deaths.popleft()
      if len(self._deaths) > self._settings.max_restarts:
        words = f'{words} ({len(self._deaths)} deaths)'
        if self._settings.essential:
          run_records.end_run(
            self._settings.run_dir, 'failed', f'{self._settings.role} {words}'
          )
        return self._leave('failed', words, code=1)
      self._say(words)
      self._write('restarting', words)
      self._pause(min(30.0, 2.0 ** (len(self._deaths) - 1)))

  @property
  def _log(self) -> pathlib.Path:
    return run_records.log_path(
      self._settings.run_dir, self._settings.role, self._settings.index
    )

  def _explain(self, code: int) -> str:
    return f'{supervisor_lib.explain_exit(code)}: {supervisor_lib.cause(self._log)}'

  def _start(self) -> None:
    self._restarts += self._child is not None
    self._incarnation += 1
    if self._settings.once:  # Those of a gang are this process's, too.
      self._restarts = self._incarnation - self._settings.first_incarnation
    # Before the process, so that no other may ever get the same number.
    self._write('running')
    environment = supervisor_lib.role_environment(
      self._settings.run_dir,
      self._settings.role,
      self._settings.index,
      self._incarnation,
    )
    if self._settings.follows:
      # It looks for a learner that moved, and waits for one that is away, by itself.
      environment['IMPALA_PATIENCE'] = str(self._settings.patience)
    self._log.parent.mkdir(exist_ok=True)
    with open(self._log, 'ab') as log:
      self._child = subprocess.Popen(
          self._settings.command, env=environment, stdin=subprocess.DEVNULL,
          stdout=log, stderr=log, start_new_session=True,
          preexec_fn=_ignore_usr1,
      )  # fmt: skip

  def _watch(self) -> int:
    """Until the process has ended, by itself or because it had to; its exit code."""
    assert self._child is not None
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
      if leave_at is None and self._ended():
        leave_at = now + self._settings.linger
      if self._settings.essential:
        for role in ('actor', 'inference'):
          self._end_if_all_failed(role)
      if self._settings.follows and self._learner_is_lost(now):
        self._lost = f'no learner for {self._settings.patience:.0f} s'
        self._end_child()
        return 0

  def _end_child(self) -> None:
    child = self._child
    assert child is not None
    child.send_signal(self._settings.stop_signal)
    try:
      child.wait(self._settings.grace)
    except subprocess.TimeoutExpired:
      self._say(f'did not end within {self._settings.grace:.0f} s: killed')
    # Engines of environments, too.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(child.pid, signal.SIGKILL)
    child.wait()

  def _end_if_all_failed(self, role: str) -> None:
    """Without any actor, or any server for them, the learner would wait for ever."""
    launch = files.read_json(self._settings.run_dir / 'launch.json')
    roles = launch.get('program', {}).get('roles', [])
    count = sum(r['replicas'] for r in roles if r['name'] == role)
    last: dict[str, Any] = {}
    for index in range(count):
      last = files.read_json(
        run_records.record_path(self._settings.run_dir, role, index)
      )
      if last.get('state') != 'failed':
        return
    if count:
      run_records.end_run(
        self._settings.run_dir,
        'failed',
        f'all {_ALL[role]}; the last one {last["words"]}',
      )

  def _learner_is_lost(self, now: float) -> bool:
    # Clocks of hosts differ: what counts is how long the file has not changed.
    try:
      sign = (self._settings.run_dir / 'status.json').stat().st_mtime_ns
    except OSError:
      sign = 0
    if sign != self._sign[0]:
      self._sign = (sign, now)
    return now - self._sign[1] > self._settings.patience

  def _ended(self, timeout: float = 0.0) -> str:
    """How the run ended, in words; empty if it goes on."""
    deadline = time.monotonic() + timeout
    while True:
      ended = files.read_json(self._settings.run_dir / 'ended.json')
      if ended:
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
    if self._stop == 'SIGUSR1' and not self._settings.once:
      self._on_limit()
    return code

  def _write(self, state: str, words: str = '') -> None:
    self._settings.record.parent.mkdir(exist_ok=True)
    files.write_json(
      self._settings.record,
      {
        'role': self._settings.role,
        'index': self._settings.index,
        'host': os.environ.get('SLURMD_NODENAME') or socket.gethostname(),
        'incarnation': self._incarnation,
        'restarts': self._restarts,
        'state': state,
        'words': words,
        'time': time.time(),
      },
    )

  def _say(self, words: str) -> None:
    print(f'{self._settings.role} {self._settings.index}: {words}', flush=True)

  def _on_signal(self, number: int, frame: Any) -> None:
    self._stop = signal.Signals(number).name


def _ignore_usr1() -> None:
  """Slurm signals every process of a step; this one is the supervisor's business."""
  signal.signal(signal.SIGUSR1, signal.SIG_IGN)
