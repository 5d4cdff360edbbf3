"""Runs all roles of a configuration on this machine, to the end or to a signal."""

import pathlib
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from impala_jax import config as config_lib
from impala_jax.launching import supervisor as supervisor_lib
from impala_jax.runtime import files

_LEARNER_GRACE = 60.0  # Seconds to finish an update, checkpoint and drain.
_EVALUATION_GRACE = 300.0  # For the last evaluation and the video.
_RESTARTS = 5


class _Signals:
  """Counts Ctrl-C, and remembers SIGTERM."""

  def __init__(self) -> None:
    self.interrupts = 0
    self.terminated = False

  def install(self) -> None:
    signal.signal(signal.SIGINT, self._on_interrupt)
    signal.signal(signal.SIGTERM, self._on_terminate)

  def _on_interrupt(self, *_: Any) -> None:
    self.interrupts += 1

  def _on_terminate(self, *_: Any) -> None:
    self.terminated = True

  @property
  def hurry(self) -> bool:
    return self.terminated or self.interrupts > 1


def run(
  config: config_lib.Config,
  run_dir: pathlib.Path,
  launches_before: int,
  show: Callable[[dict[str, Any], str], None],
) -> int:
  """Returns the exit code: 0 at the end or after a signal, 1 if a role failed.

  Args:
    config: of the run, as in `run_dir`.
    run_dir: see `run_directory`.
    launches_before: how often this run was launched before.
    show: called about twice a second with the status (empty before the first) and
      a phase in words.
  """
  signals = _Signals()
  signals.install()
  # Room for restarts within one launch.
  supervisor = supervisor_lib.Supervisor(run_dir, 1000 * launches_before)
  failure = ''
  try:
    if config.transport.kind == 'local':
      supervisor.add('all')
      main = 'all'
    else:
      supervisor.add('learner')
      main = 'learner'
      for index in range(config.inference.servers):
        supervisor.add('inference', index, max_restarts=_RESTARTS)
      for index in range(config.actor.num_actors):
        supervisor.add('actor', index, max_restarts=_RESTARTS)
      if config.evaluator.enabled:
        supervisor.add('evaluator', max_restarts=_RESTARTS)
    learner = supervisor.get(main)
    assert learner is not None
    while not learner.done and not signals.interrupts and not signals.terminated:
      show(_status(run_dir), _restarts(supervisor))
      time.sleep(0.5)
      supervisor.poll()
  except supervisor_lib.RoleFailed as e:
    failure = str(e)
  finally:
    left = _stop(supervisor, signals, run_dir, show, bool(failure))
  if failure:
    print(f'impala_jax: {failure}', file=sys.stderr)
    return 1
  if left:
    print(f'impala_jax: had to kill {", ".join(left)}', file=sys.stderr)
    return 1
  return 0


def _stop(
  supervisor: supervisor_lib.Supervisor,
  signals: _Signals,
  run_dir: pathlib.Path,
  show: Callable[[dict[str, Any], str], None],
  failed: bool,
) -> list[str]:
  """Ends the learner (with a checkpoint), then the rest; returns what was killed."""

  def wait(role: str, seconds: float, phase: str, patient: bool = False) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not supervisor.wait(role, 0.5):
      show(_status(run_dir), phase)
      if patient and signals.hurry:
        return

  supervisor.terminate('learner', 'all')
  seconds = _LEARNER_GRACE if not failed else 15.0
  everything = 'stopping: the learner writes a checkpoint'
  wait('learner', seconds, everything)
  if failed or signals.hurry:
    supervisor.terminate('evaluator')
  wait('all', seconds + (0 if signals.hurry else _EVALUATION_GRACE), everything)
  # The learner has told them; one that was not there to hear is told here.
  wait('actor', 5.0, 'stopping: actors')
  supervisor.terminate('actor')
  wait('actor', 10.0, 'stopping: actors')
  supervisor.terminate('inference')
  wait('inference', 10.0, 'stopping: inference servers')
  phase = 'last evaluation and video (Ctrl-C to skip them)'
  wait('evaluator', _EVALUATION_GRACE, phase, patient=True)
  supervisor.terminate('evaluator')
  wait('evaluator', 10.0, 'stopping: evaluator')
  return supervisor.kill()


def _restarts(supervisor: supervisor_lib.Supervisor) -> str:
  words = [
    f'{c.name} restarted {c.restarts}x' for c in supervisor.children if c.restarts
  ]
  return ', '.join(words) or 'running'


def _status(run_dir: pathlib.Path) -> dict[str, Any]:
  return files.read_json(run_dir / 'status.json')
