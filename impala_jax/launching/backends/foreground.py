"""This machine, for as long as a terminal shows the run.

The same program under the same supervision as detached: each process is looked after
by a thread of the launcher, in place of a process of its own. When the launcher goes,
so do they.
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

from impala_jax.launching import program as program_lib
from impala_jax.launching import supervision
from impala_jax.launching.backends import backend, local
from impala_jax.runtime import files, role_environment, stage
from impala_jax.runtime.run_directory import RunDirectory

Show = Callable[[dict[str, Any], str], None]
_TICK = 0.5
_LEAVE = 5.0  # Seconds for actors and servers to leave a run that has ended,
_GRACE = 10.0  # and from then on from SIGTERM to SIGKILL: somebody waits.
_SILENT = 15.0  # Seconds without a status that are worth a word.
_LOOKED_AT = 8  # Processes whose logs are read for what they do.
_STATES = {'running': 'running', 'restarting': 'pending', 'waiting': 'pending',
           'failed': 'failed'}  # fmt: skip
_STOP_TIMEOUT = 450.0  # Seconds: a checkpoint, a last evaluation and a film.


class Foreground(backend.Backend):
  """See the module; `options` are `backend.Options`."""

  name = 'foreground'

  def render(self, program: program_lib.Program) -> dict[str, str]:
    return {}

  def commands(self, program: program_lib.Program) -> list[list[str]]:
    return [
      [self.options.python, *role.argv]
      for role in program.roles
      for _ in range(role.replicas)
    ]

  def submit(self, program: program_lib.Program) -> backend.Launch:
    """Only notes that this process runs it; see `run`."""
    self.write_files(program, {})
    RunDirectory(pathlib.Path(program.run_dir)).begin_launch()
    me = psutil.Process()
    return self.new_launch(program, {'pid': me.pid, 'created': me.create_time()})

  def run(self, program: program_lib.Program, show: Show) -> tuple[int, list[str]]:
    """Runs all roles to the end, or to a signal. Call it from the main thread.

    A Ctrl-C ends the run in order, with a checkpoint, a last evaluation and films; a
    second one, or SIGTERM, skips the evaluation; a third one kills what still runs.

    Args:
      program: of the run.
      show: called about twice a second with the status (empty before the first) and
        a phase in words.

    Returns:
      The exit code, 1 where a role failed for good or had to be killed, and a line for
      each such.
    """
    launch = self.submit(program)
    run = launch.run
    signals = _Signals()
    signals.install()
    with open(run.logs / 'supervisors.log', 'ab', buffering=0) as log:
      processes = [
        supervision.Supervised(
          self._settings(program, role, index), run, say=lambda x: _note(log, x)
        )
        for role in program.roles
        for index in range(role.replicas)
      ]
      threads = [
        threading.Thread(target=p.run, name=p.name, daemon=True) for p in processes
      ]
      for thread in threads:
        thread.start()
      while any(thread.is_alive() for thread in threads):
        if signals.seen:
          _end_run(run, processes)
        ended = run.how_ended()
        broken = any(p.broken for p in processes)
        if broken:  # That it has ended can perhaps not be written.
          _stop_all(processes)
        _end(processes, signals, broken or ended.get('reason') == 'failed')
        status = run.read_status()
        phase = _phase(processes, broken or bool(ended))
        if not (ended or broken):
          phase = ', '.join(filter(None, [phase, _starting(run, processes, status)]))
        show(status, phase or 'running')
        time.sleep(_TICK)
    return _verdict(run, processes)

  def status(self, launch: backend.Launch) -> list[backend.Task]:
    launcher = local.process_of(launch.handles)
    alive, halted = launcher is not None, _halted(launcher)
    tasks = []
    for role in launch.program.roles:
      for index in range(role.replicas):
        record = files.read_json(launch.run.supervised(role.name, index))
        state = _STATES.get(record.get('state', ''), 'done')
        if not alive and state != 'failed':
          state = 'done'
        detail = 'foreground' + halted.get((role.name, index), '')
        tasks.append(backend.Task(role.name, index, state, 'localhost', detail))
    return tasks

  def scale(self, launch: backend.Launch, role: str, replicas: int) -> str:
    raise backend.BackendError(
      'a run in the foreground has a fixed number of actors: start it with '
      '--launcher=local to scale it'
    )

  def stop(self, launch: backend.Launch) -> str:
    process = local.process_of(launch.handles)
    if process is None:
      return 'had ended before'
    process.send_signal(signal.SIGINT)
    if local.wait_for([launch.handles], _STOP_TIMEOUT):
      raise backend.BackendError(
        f'process {process.pid} did not end within {_STOP_TIMEOUT:.0f} s'
      )
    return 'stopped'

  def _settings(
    self, program: program_lib.Program, role: program_lib.Role, index: int
  ) -> supervision.Settings:
    settings = supervision.settings_of(program, role, self.options.python, index)
    if settings.essential:
      return settings
    linger = settings.linger if role.name == 'evaluator' else _LEAVE
    return dataclasses.replace(settings, linger=linger, grace=_GRACE)


def _halted(launcher: psutil.Process | None) -> dict[tuple[str, int], str]:
  """Role and index of the processes that a signal has stopped, with words."""
  found = {}
  with contextlib.suppress(psutil.Error):
    for child in launcher.children() if launcher is not None else []:
      if child.status() == psutil.STATUS_STOPPED:
        index = role_environment.RoleEnvironment.read(child.environ()).index
        found[child.cmdline()[-1], index] = (
          f', {child.pid} is stopped by a signal (kill -CONT lets it go on)'
        )
  return found


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
  def seen(self) -> bool:
    return self.terminated or self.interrupts > 0

  @property
  def hurry(self) -> bool:
    return self.terminated or self.interrupts > 1


def _end_run(run: RunDirectory, processes: list[supervision.Supervised]) -> None:
  try:
    run.end('stopped')
  except OSError:  # A full disk: they cannot read of it.
    _stop_all(processes)


def _stop_all(processes: list[supervision.Supervised]) -> None:
  for process in processes:
    process.stop('the run has ended')


def _end(
  processes: list[supervision.Supervised], signals: _Signals, failed: bool
) -> None:
  """Tells those to stop that should not wait for the end of the run to be noticed."""
  if signals.interrupts > 2:
    for process in processes:
      process.kill()
  main_runs = False
  for process in processes:
    if process.settings.essential:
      main_runs = main_runs or process.state in ('waiting', 'running', 'restarting')
      if signals.seen:
        process.stop('SIGTERM' if signals.terminated else 'SIGINT')
  for process in processes:
    # The last evaluation is of the learner's last checkpoint.
    skip = failed or (signals.hurry and not main_runs)
    if process.settings.role == 'evaluator' and skip:
      process.stop('nobody waits for the last evaluation')


def _phase(processes: list[supervision.Supervised], ended: bool) -> str:
  if not ended:
    words = [
      f'{p.name} restarted {p.restarts}x'
      + (f' ({p.words})' if p.state == 'restarting' else '')
      for p in processes
      if p.restarts
    ]
    words += [f'{p.name} failed for good' for p in processes if p.state == 'failed']
    words += [
      f'{p.name} is stopped by a signal (kill -CONT {pid} lets it go on)'
      for p in processes
      if (pid := p.halted)
    ]
    return ', '.join(words)
  running = [p for p in processes if p.state in ('running', 'restarting')]
  if any(p.settings.essential for p in running):
    return 'stopping: the learner writes a checkpoint'
  if all(p.settings.role == 'evaluator' for p in running):
    return 'last evaluation and video (Ctrl-C to skip them)'
  return 'stopping: actors'


def _starting(
  run: RunDirectory, processes: list[supervision.Supervised], status: dict[str, Any]
) -> str:
  """What processes do before they can say it themselves, or that there is no word."""
  if status:
    silent = time.time() - status.get('time', 0.0)
    if silent > _SILENT and any(p.state == 'running' for p in processes):
      if 'compiling' in status.get('bottleneck', ''):
        return f'learner: compiling the update for {silent:.0f} s'
      return f'nothing heard of the learner for {silent:.0f} s'
    if not status.get('bottleneck', '').startswith('starting'):
      return ''
  names: dict[str, list[str]] = {}
  for process in processes[:_LOOKED_AT]:
    words = stage.of_log(run.log(process.settings.role, process.settings.index))
    if words and words != stage.UNDER_WAY and process.state == 'running':
      names.setdefault(words, []).append(process.name)
  return ', '.join(f'{" and ".join(who)}: {words}' for words, who in names.items())


def _verdict(
  run: RunDirectory, processes: list[supervision.Supervised]
) -> tuple[int, list[str]]:
  lines = []
  ended = run.how_ended()
  if ended.get('reason') == 'failed':
    lines.append(str(ended.get('cause')))
  else:
    lines += [f'{p.name} {p.words}' for p in processes if p.state == 'failed']
  if killed := [p.name for p in processes if p.killed]:
    lines.append(f'had to kill {", ".join(killed)}')
  return int(bool(lines)), lines


def _note(log: Any, line: str) -> None:
  text = f'{time.strftime("%Y-%m-%d %H:%M:%S")} {line} [{os.getpid()}]\n'
  with contextlib.suppress(OSError):  # A full disk ends no run by itself.
    log.write(text.encode(errors='replace'))
