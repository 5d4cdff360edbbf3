"""Runs the roles of one machine as child processes and restarts those that may be.

Each child has its own session, so a Ctrl-C at the terminal reaches only the
launcher, which stops the children in order.
"""

import collections
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

from impala_jax.distributed.roles import run as run_role
from impala_jax.runtime import files

_WINDOW = 600.0  # Seconds in which `max_restarts` counts.


@dataclasses.dataclass
class Child:
  """One role's process and its history."""

  role: str
  index: int
  log: pathlib.Path
  max_restarts: int  # Within ten minutes; 0: its death ends the run.
  process: subprocess.Popen[bytes] | None = None
  incarnation: int = 0
  restarts: int = 0
  start_at: float = 0.0  # Not before this time.
  done: bool = False  # Ended by itself with success.
  deaths: collections.deque[float] = dataclasses.field(
    default_factory=collections.deque
  )

  @property
  def name(self) -> str:
    return process_name(self.role, self.index)

  @property
  def alive(self) -> bool:
    return self.process is not None and self.process.poll() is None


class RoleFailed(Exception):
  """A role died for good; the text names the cause."""


class Supervisor:
  """Starts, watches and stops the processes of a run.

  Args:
    run_dir: holds `config.json`; logs go to its `logs/`.
    first_incarnation: of the roles; grows from one launch to the next, so that a
      resumed run's unrolls are not taken for repeated ones.
  """

  def __init__(self, run_dir: pathlib.Path, first_incarnation: int = 0):
    self._run_dir = run_dir
    self._first = first_incarnation
    self.children: list[Child] = []
    (run_dir / 'logs').mkdir(parents=True, exist_ok=True)

  def add(self, role: str, index: int = 0, max_restarts: int = 0) -> None:
    log = self._run_dir / 'logs' / f'{process_name(role, index)}.log'
    child = Child(role, index, log, max_restarts, incarnation=self._first)
    self.children.append(child)
    self._start(child)

  def poll(self) -> None:
    """Restarts what has died and may be restarted.

    Raises:
      RoleFailed: a role that the run cannot go on without has died.
    """
    now = time.monotonic()
    for child in self.children:
      if child.done or child.alive:
        continue
      if child.process is None:
        if now >= child.start_at:
          self._start(child)
        continue
      code = child.process.returncode
      # One that may not be restarted and ends in order has ended the run.
      if code == 0 or (code == run_role.STOPPED and not child.max_restarts):
        child.done = True
        continue
      child.process = None
      child.deaths.append(now)
      while child.deaths and now - child.deaths[0] > _WINDOW:
        child.deaths.popleft()
      if len(child.deaths) > child.max_restarts:
        child.done = True
        times = f' {len(child.deaths)} times in a row' if child.max_restarts else ''
        raise RoleFailed(
          f'{child.name} {explain_exit(code)}{times}: {cause(child.log)}'
        )
      child.restarts += 1
      child.incarnation += 1
      child.start_at = now + min(30.0, 2.0 ** (len(child.deaths) - 1))

  def get(self, role: str) -> Child | None:
    return next((c for c in self.children if c.role == role), None)

  def terminate(self, *roles: str) -> None:
    """SIGTERM to the processes of these roles."""
    for child in self.children:
      if child.role in roles:
        child.done = True  # No restart.
        if child.alive and child.process is not None:
          child.process.send_signal(signal.SIGTERM)

  def wait(self, role: str, timeout: float) -> bool:
    """Waits for all processes of a role to end; False if some did not in time."""
    deadline = time.monotonic() + timeout
    for child in self.children:
      if child.role != role or child.process is None:
        continue
      try:
        child.process.wait(max(0.0, deadline - time.monotonic()))
      except subprocess.TimeoutExpired:
        return False
    return True

  def kill(self) -> list[str]:
    """SIGKILL to whatever is left; returns the names."""
    left = [c for c in self.children if c.alive]
    for child in left:
      assert child.process is not None
      child.process.kill()
      child.process.wait()
    return [c.name for c in left]

  def _start(self, child: Child) -> None:
    environment = role_environment(
      self._run_dir, child.role, child.index, child.incarnation
    )
    with open(child.log, 'ab') as log:
      child.process = subprocess.Popen(
          [sys.executable, '-m', 'impala_jax.distributed.roles.run', child.role],
          env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
          start_new_session=True,
      )  # fmt: skip


def role_environment(
  run_dir: pathlib.Path, role: str, index: int, incarnation: int
) -> dict[str, str]:
  """Environment variables of a role's process that this process starts."""
  environment = {
    **os.environ,
    'IMPALA_RUN_DIR': str(run_dir),
    'IMPALA_INDEX': str(index),
    'IMPALA_INCARNATION': str(incarnation),
    'IMPALA_PARENT': str(os.getpid()),
    'PYTHONUNBUFFERED': '1',
    'TF_CPP_MIN_LOG_LEVEL': '2',  # TensorFlow only carries Reverb here.
  }
  config = files.read_json(run_dir / 'config.json').get('config', {})
  platform = config.get(role, {}).get('platform', 'auto')
  if role == 'evaluator' or (role == 'actor' and platform == 'auto'):
    platform = 'cpu'
  if role == 'learner' or role == 'all':
    return environment
  if platform == 'cpu':
    # The learner's accelerator must not be seized by its actors.
    environment['JAX_PLATFORMS'] = 'cpu'
  else:
    # A GPU may be shared with the learner: take what is needed, not three quarters.
    environment.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  if role != 'inference':
    # XLA's threads for a policy call: with one, no core is woken for a millisecond's
    # work, which environments and other actors make better use of.
    environment.setdefault('NPROC', '1')
  return environment


def process_name(role: str, index: int) -> str:
  """Actors are numbered always, other roles from the second process on."""
  return f'{role}-{index}' if role == 'actor' or index else role


def explain_exit(code: int) -> str:
  if code < 0:
    return f'was ended by signal {signal.Signals(-code).name}'
  if code == run_role.STOPPED:
    return 'was told to stop by SIGTERM'
  return f'ended with exit code {code}'


def cause(log: pathlib.Path) -> str:
  """The last words of a role's log that tell why it ended."""
  try:
    lines = log.read_text(errors='replace').splitlines()[-200:]
  except OSError as e:
    return f'no log: {e.strerror}'
  for line in reversed(lines):
    if line.startswith('CAUSE: '):
      return line.removeprefix('CAUSE: ')
  words = [line for line in lines if line.strip()]
  return f'{words[-1].strip()} (see {log})' if words else f'see {log}'
