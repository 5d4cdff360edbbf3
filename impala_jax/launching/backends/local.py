"""This machine: every replica a supervised process that outlives the terminal.

The same supervisors and role commands as on a cluster. (`launching.foreground` is the
other way to run here: in the foreground, with a live view, until Ctrl-C.)
"""

import dataclasses
import os
import pathlib
import shlex
import signal
import subprocess
import time
from typing import Any

import psutil

from impala_jax.launching import local_gang, supervision
from impala_jax.launching import program as program_lib
from impala_jax.launching.backends import backend
from impala_jax.runtime import files, role_environment
from impala_jax.runtime.run_directory import RunDirectory

_LEAVE_TIMEOUT = 45.0
_KILL_TIMEOUT = 10.0


class Local(backend.Backend):
  """See the module; `options` are `backend.Options`, without `setup`."""

  name = 'local'

  def render(self, program: program_lib.Program) -> dict[str, str]:
    lines = [
      '#!/bin/sh',
      *(f'export {k}={shlex.quote(v)}' for k, v in self._environment(program).items()),
    ]
    lines += [f'{shlex.join(c)} &' for c in self.commands(program)]
    return {'plan.sh': '\n'.join([*lines, 'wait', ''])}

  def commands(self, program: program_lib.Program) -> list[list[str]]:
    return [
      self._command(program, role, index)
      for role in program.roles
      for index in range(1 if role.restart.gang else role.replicas)
    ]

  def submit(self, program: program_lib.Program) -> backend.Launch:
    self.write_files(program, self.render(program))
    RunDirectory(pathlib.Path(program.run_dir)).begin_launch()
    launch = self.new_launch(program, {})
    self._start(
      launch,
      [
        (role, index)
        for role in program.roles
        for index in range(1 if role.restart.gang else role.replicas)
      ],
    )
    return launch

  def status(self, launch: backend.Launch) -> list[backend.Task]:
    tasks = []
    for role, handle in launch.handles.items():
      gang = launch.program.role(role).restart.gang
      processes = handle * launch.program.role(role).replicas if gang else handle
      for index, process in enumerate(processes):
        record = files.read_json(launch.run.supervised(role, index))
        if process_of(process) is not None:
          # One that has ended starts again with its gang.
          waits = gang and record.get('state') != 'running'
          state = 'pending' if waits else 'running'
        else:
          state = 'failed' if record.get('state') == 'failed' else 'done'
        detail = f'process {process["pid"]}{_halted(process)}'
        tasks.append(backend.Task(role, index, state, 'localhost', detail))
    return tasks

  def scale(self, launch: backend.Launch, role: str, replicas: int) -> str:
    before = launch.program.role(role).replicas
    program = launch.program.scaled(role, replicas)
    if not wait_for(launch.handles[program.main.name], 0.0):
      raise backend.BackendError('its learner has gone: go on with it by --resume')
    launch.program = program
    changed = program.role(role)
    self._start(launch, [(changed, index) for index in range(before, replicas)])
    gone = launch.handles[role][replicas:]
    launch.handles[role] = launch.handles[role][:replicas]
    launch.write()
    if left := _end(gone, changed.grace + 5.0):
      raise backend.BackendError(f'had to kill {left} of {role}')
    return f'{role}: {before} -> {replicas}'

  def stop(self, launch: backend.Launch) -> str:
    launch.run.end('stopped')
    words = []
    main = launch.program.main
    grace = main.grace
    if _end(launch.handles[main.name], grace + 20.0):
      words.append(f'the learner did not end within {grace:.0f} s: killed')
    rest = [p for handle in launch.handles.values() for p in handle]
    # They have seen that the run ended, and leave by themselves.
    wait_for(rest, _LEAVE_TIMEOUT)
    if alive := sum(process_of(p) is not None for p in rest):
      words.append(f'ended {alive} that were still there')
      _end(rest, 40.0)
    return '; '.join(['stopped', *words])

  def _environment(self, program: program_lib.Program) -> dict[str, str]:
    return role_environment.variables(
      run_dir=program.run_dir, count=program.main.replicas
    )

  def _command(
    self, program: program_lib.Program, role: program_lib.Role, index: int
  ) -> list[str]:
    python = self.options.python
    settings = supervision.settings_of(program, role, python, index)
    if role.restart.gang:
      # One process keeps the learners, each once; the supervisor above starts it again.
      each = dataclasses.replace(settings, once=True, essential=False, max_restarts=0)
      gang = local_gang.command(python, role.replicas, each)
      settings = dataclasses.replace(
        settings, role=f'{role.name}-gang', command=tuple(gang), grace=role.grace + 15.0
      )
    return supervision.command(python, settings)

  def _start(
    self, launch: backend.Launch, replicas: list[tuple[program_lib.Role, int]]
  ) -> None:
    """Starts and notes them all, or none.

    Raises:
      backend.BackendError: this machine has no room, of whatever kind.
    """
    program, started = launch.program, []
    try:
      for role, index in replicas:
        with open(launch.run.logs / 'supervisors.log', 'ab') as log:
          process = subprocess.Popen(
            self._command(program, role, index),
            cwd=program.work_dir,
            env={**os.environ, **self._environment(program)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
          )
        # With the time, because process numbers are used again.
        created = psutil.Process(process.pid).create_time()
        handle = {'pid': process.pid, 'created': created}
        started.append(handle)
        launch.handles.setdefault(role.name, []).append(handle)
      launch.write()
    except (OSError, psutil.Error, backend.BackendError) as e:
      _end(started, _LEAVE_TIMEOUT)
      raise backend.BackendError(f'{e}: what had been started was ended') from e


def process_of(handle: dict[str, Any]) -> psutil.Process | None:
  """The live process of a handle."""
  try:
    process = psutil.Process(handle['pid'])
    same = abs(process.create_time() - handle['created']) < 1.0
    return process if same and process.status() != psutil.STATUS_ZOMBIE else None
  except psutil.Error:
    return None


def _halted(handle: dict[str, Any]) -> str:
  """Which process of a supervisor's is stopped by a signal, in words."""
  supervisor = process_of(handle)
  if supervisor is None:
    return ''
  try:
    for process in (supervisor, *supervisor.children()):
      if process.status() == psutil.STATUS_STOPPED:
        return f', {process.pid} is stopped by a signal (kill -CONT lets it go on)'
  except psutil.Error:
    pass
  return ''


def wait_for(handles: list[dict[str, Any]], timeout: float) -> list[psutil.Process]:
  """Those that still run after `timeout` seconds."""
  deadline = time.monotonic() + timeout
  while True:
    alive = [p for p in map(process_of, handles) if p is not None]
    if not alive or time.monotonic() >= deadline:
      return alive
    time.sleep(0.2)


def _end(handles: list[dict[str, Any]], grace: float) -> int:
  """SIGTERM, then SIGKILL; returns how many had to be killed."""
  for process in wait_for(handles, 0.0):
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)  # A stopped one would not hear of it.
  left = wait_for(handles, grace)
  for process in left:
    for child in (*process.children(recursive=True), process):
      child.kill()
  if left:
    wait_for(handles, _KILL_TIMEOUT)
  return len(left)
