"""This machine: every replica a supervised process that outlives the terminal.

The same supervisors and role commands as on a cluster. (`launching.foreground` is the
other way to run here: in the foreground, with a live view, until Ctrl-C.)
"""

import os
import pathlib
import shlex
import signal
import subprocess
import time
from typing import Any

import psutil

from impala_jax.launching import program as program_lib
from impala_jax.launching import run_records
from impala_jax.launching.backends import backend
from impala_jax.runtime import files

_LEAVE_TIMEOUT = 45.0
_KILL_TIMEOUT = 10.0
_EVALUATION = 300


class Local(backend.Backend):
  """See the module; `options` are `backend.Options`, without `setup`."""

  name = 'local'

  def render(self, program: program_lib.Program) -> dict[str, str]:
    lines = ['#!/bin/sh', *(f'export {k}={shlex.quote(v)}' for k, v in
             self._environment(program).items())]  # fmt: skip
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
    run_records.reset(pathlib.Path(program.run_dir))
    launch = self.new_launch(program, {})
    for role in program.roles:
      for index in range(1 if role.restart.gang else role.replicas):
        self._start(launch, role, index)
    launch.write()
    return launch

  def status(self, launch: backend.Launch) -> list[backend.Task]:
    tasks = []
    for role, handle in launch.handles.items():
      gang = launch.program.role(role).restart.gang
      processes = handle * launch.program.role(role).replicas if gang else handle
      for index, process in enumerate(processes):
        record = files.read_json(run_records.record_path(launch.run_dir, role, index))
        if _process(process) is not None:
          # One that has ended starts again with its gang.
          waits = gang and record.get('state') != 'running'
          state = 'pending' if waits else 'running'
        else:
          state = 'failed' if record.get('state') == 'failed' else 'done'
        detail = f'process {process["pid"]}'
        tasks.append(backend.Task(role, index, state, 'localhost', detail))
    return tasks

  def scale(self, launch: backend.Launch, role: str, replicas: int) -> str:
    before = launch.program.role(role).replicas
    launch.program = launch.program.scaled(role, replicas)
    for index in range(before, replicas):
      self._start(launch, launch.program.role(role), index)
    gone = launch.handles[role][replicas:]
    launch.handles[role] = launch.handles[role][:replicas]
    launch.write()
    if left := _end(gone, launch.program.role(role).grace + 5.0):
      raise backend.BackendError(f'had to kill {left} of {role}')
    return f'{role}: {before} -> {replicas}'

  def stop(self, launch: backend.Launch) -> str:
    run_records.end_run(launch.run_dir, 'stopped')
    words = []
    grace = launch.program.role('learner').grace
    if _end(launch.handles['learner'], grace + 20.0):
      words.append(f'the learner did not end within {grace:.0f} s: killed')
    rest = [p for handle in launch.handles.values() for p in handle]
    # They have seen that the run ended, and leave by themselves.
    _wait(rest, _LEAVE_TIMEOUT)
    if alive := sum(_process(p) is not None for p in rest):
      words.append(f'ended {alive} that were still there')
      _end(rest, 40.0)
    return '; '.join(['stopped', *words])

  def _environment(self, program: program_lib.Program) -> dict[str, str]:
    count = program.role('learner').replicas
    return {'IMPALA_RUN_DIR': program.run_dir, 'IMPALA_COUNT': str(count)}

  def _command(
    self, program: program_lib.Program, role: program_lib.Role, index: int
  ) -> list[str]:
    python = self.options.python
    command, name, grace = [python, *role.argv], role.name, role.grace
    incarnation = f'--first_incarnation={program.first_incarnation}'
    if role.restart.gang:
      command = [
          python, '-m', 'impala_jax.launching.local_gang', f'--count={role.replicas}',
          incarnation, f'--grace={grace:g}', '--', *command,
      ]  # fmt: skip
      name, grace = f'{name}-gang', grace + 15.0
    return [
        python, '-m', 'impala_jax.launching.supervise', name, f'--index={index}',
        incarnation,
        f'--max_restarts={role.restart.max_restarts}',
        f'--window={role.restart.window:g}', f'--grace={grace:g}',
        *(['--essential'] if role.restart.essential else
          [f'--linger={_EVALUATION if role.name == "evaluator" else 20}']),
        '--', *command,
    ]  # fmt: skip

  def _start(self, launch: backend.Launch, role: program_lib.Role, index: int) -> None:
    program = launch.program
    with open(launch.run_dir / 'logs' / 'supervisors.log', 'ab') as log:
      process = subprocess.Popen(
          self._command(program, role, index), cwd=program.work_dir,
          env={**os.environ, **self._environment(program)},
          stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
      )  # fmt: skip
    # With the time, because process numbers are used again.
    created = psutil.Process(process.pid).create_time()
    handle = {'pid': process.pid, 'created': created}
    launch.handles.setdefault(role.name, []).append(handle)


def _process(handle: dict[str, Any]) -> psutil.Process | None:
  """The live process of a handle."""
  try:
    process = psutil.Process(handle['pid'])
    same = abs(process.create_time() - handle['created']) < 1.0
    return process if same and process.status() != psutil.STATUS_ZOMBIE else None
  except psutil.Error:
    return None


def _wait(handles: list[dict[str, Any]], timeout: float) -> list[psutil.Process]:
  """Those that still run after `timeout` seconds."""
  deadline = time.monotonic() + timeout
  while True:
    alive = [p for p in map(_process, handles) if p is not None]
    if not alive or time.monotonic() >= deadline:
      return alive
    time.sleep(0.2)


def _end(handles: list[dict[str, Any]], grace: float) -> int:
  """SIGTERM, then SIGKILL; returns how many had to be killed."""
  for process in _wait(handles, 0.0):
    process.send_signal(signal.SIGTERM)
  left = _wait(handles, grace)
  for process in left:
    for child in (*process.children(recursive=True), process):
      child.kill()
  if left:
    _wait(handles, _KILL_TIMEOUT)
  return len(left)
