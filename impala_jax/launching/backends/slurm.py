"""Slurm: the learners one job, the evaluator one, the actors job arrays.

Each job's shell becomes `launching.supervise`, which restarts processes; Slurm
requeues jobs whose node is lost or preempted. Not one heterogeneous job: losing an
actor's node would requeue the learner.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from impala_jax.launching import program as program_lib
from impala_jax.launching.backends import backend, slurm_scripts
from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory

Options = slurm_scripts.Options

_DEFAULT_MAX_ARRAY = 1001  # Slurm's own default.
# Variables with defaults of Slurm's commands; and those of them in which a site or a
# user chooses what a script leaves to them, with the word by which it would not.
_DEFAULTS = re.compile('(SACCT|SBATCH|SCANCEL|SCONTROL|SQUEUE)_')
_CHOICES = {
  'SBATCH_ACCOUNT': 'account', 'SBATCH_CLUSTERS': 'clusters',
  'SBATCH_CONSTRAINT': 'constraint', 'SBATCH_EXPORT': 'export',
  'SBATCH_PARTITION': 'partition', 'SBATCH_QOS': 'qos',
  'SBATCH_RESERVATION': 'reservation', 'SBATCH_TIMELIMIT': 'time',
}  # fmt: skip
# What a job is told, and this is not: a shell within another job.
_OF_A_JOB = re.compile('SLURMD?_(?!(CONF|CONF_SERVER|CLUSTERS|JWT)$)')
_LEAVE_TIMEOUT = 45.0  # Seconds for actors to leave a run that has ended.
_CANCEL_TIMEOUT = 90.0  # Seconds until Slurm's SIGKILL must have worked.
_STATES = {
  'COMPLETED': 'done', 'CANCELLED': 'done', 'RUNNING': 'running',
  'COMPLETING': 'running', 'STOPPED': 'running', 'SIGNALING': 'running',
  'FAILED': 'failed', 'TIMEOUT': 'failed', 'NODE_FAIL': 'failed',
  'OUT_OF_MEMORY': 'failed', 'BOOT_FAIL': 'failed', 'DEADLINE': 'failed',
}  # fmt: skip


class Slurm(backend.Backend):
  """See the module; `options` are `Options`."""

  name = 'slurm'
  options: Options

  def render(self, program: program_lib.Program) -> dict[str, str]:
    return slurm_scripts.render(program, self.options)

  def commands(self, program: program_lib.Program) -> list[list[str]]:
    folder = RunDirectory(pathlib.Path(program.run_dir)).launch_files
    return [['sbatch', '--parsable', str(folder / f)] for f in self.render(program)]

  def submit(self, program: program_lib.Program) -> backend.Launch:
    if not self.options.max_array_size:
      options = dataclasses.replace(self.options, max_array_size=_max_array_size())
      return Slurm(options).submit(program)
    self.write_files(program, self.render(program))
    RunDirectory(pathlib.Path(program.run_dir)).begin_launch()
    handles: dict[str, Any] = {}
    with _all_or_nothing(lambda: _job_ids(handles)):
      for role in program.roles:
        if role.one_by_one:
          handles[role.name] = []
          for first, count in slurm_scripts.chunks(self.options, 0, role.replicas):
            job = _sbatch(program, slurm_scripts.file_name(role.name, first))
            handles[role.name].append({'job': job, 'first': first, 'count': count})
        else:
          handles[role.name] = _sbatch(program, f'{role.name}.sbatch')
      return self.new_launch(program, handles)

  def status(self, launch: backend.Launch) -> list[backend.Task]:
    places = []
    for role, handle in launch.handles.items():
      if isinstance(handle, str):  # Several learners are one job.
        replicas = launch.program.role(role).replicas
        places += [(handle, role, i) for i in range(replicas)]
      else:
        for chunk in handle:
          for i in range(chunk['count']):
            places.append((f'{chunk["job"]}_{i}', role, chunk['first'] + i))
    found = _jobs(launch)
    tasks = []
    for job, role, index in places:
      state, where, detail = found.get(job, ('GONE', '', 'Slurm has forgotten it'))
      name = _STATES.get(state, 'pending')
      if state == 'GONE':
        record = files.read_json(launch.run.supervised(role, index))
        name = 'failed' if record.get('state') == 'failed' else 'done'
      words = f'job {job} {state.lower()}' + (f' ({detail})' if detail else '')
      tasks.append(backend.Task(role, index, name, where, words))
    return tasks

  def scale(self, launch: backend.Launch, role: str, replicas: int) -> str:
    before = launch.program.role(role).replicas
    program = launch.program.scaled(role, replicas)
    chunks = launch.handles[role]
    if replicas > before:
      more: list[dict[str, Any]] = []
      with _all_or_nothing(lambda: [c['job'] for c in more]):
        for first, count in slurm_scripts.chunks(self.options, before, replicas):
          name = slurm_scripts.file_name(role, first, len(chunks) + len(more))
          script = slurm_scripts.array(
            program, self.options, program.role(role), first, count
          )
          self.write_files(program, {name: script})
          job = _sbatch(program, name)
          more.append({'job': job, 'first': first, 'count': count})
        launch.handles[role] = [*chunks, *more]
        launch.program = program
        launch.write()
      return f'{role}: {before} -> {replicas}'
    cancelled = []
    for chunk in chunks:
      keep = max(0, min(chunk['count'], replicas - chunk['first']))
      if keep < chunk['count']:
        cancelled.append(f'{chunk["job"]}_[{keep}-{chunk["count"] - 1}]')
        chunk['count'] = keep
    if cancelled:
      _slurm('scancel', *cancelled)
    launch.handles[role] = [c for c in chunks if c['count']]
    launch.program = program
    launch.write()
    return f'{role}: {before} -> {replicas}'

  def stop(self, launch: backend.Launch) -> str:
    # Supervisors read it, too: the learner's ends at once, others after it.
    launch.run.end('stopped')
    main = launch.program.main
    learner = launch.handles[main.name]
    waiting = _alive(launch)
    pending = [j for j, s in waiting.items() if s == 'pending']
    if pending:
      _slurm('scancel', *pending)
    if learner in waiting and learner not in pending:
      _slurm('scancel', '--batch', '--signal=TERM', learner)
    grace = main.grace
    words = []
    if not _wait(launch, {learner}, grace + 10.0):
      words.append(f'the learner did not end within {grace:.0f} s')
    _wait(launch, None, _LEAVE_TIMEOUT)
    if left := _alive(launch):
      words.append(f'cancelled {len(left)} that were still there')
      _slurm('scancel', *left)
    if not _wait(launch, None, _CANCEL_TIMEOUT):
      raise backend.BackendError(
        f'still there {_CANCEL_TIMEOUT:.0f} s after scancel: '
        + ', '.join(sorted(_alive(launch)))
      )
    return '; '.join(['stopped', *words])


@contextlib.contextmanager
def _all_or_nothing(jobs: Callable[[], list[str]]) -> Iterator[None]:
  """Cancels the jobs that the block has submitted, and no others, where it fails."""
  try:
    yield
  except BaseException as e:
    submitted = jobs()
    try:
      if submitted:
        _slurm('scancel', *submitted)
    except backend.BackendError as left:
      raise backend.BackendError(
        f'{e}; still there are the jobs {", ".join(submitted)}: {left}'
      ) from e
    raise


def _sbatch(program: program_lib.Program, name: str) -> str:
  path = RunDirectory(pathlib.Path(program.run_dir)).launch_files / name
  script = os.fsdecode(path.read_bytes())
  # They would win over what is said in the script.
  chosen = [n for n, word in _CHOICES.items() if f'#SBATCH --{word}=' not in script]
  answer = _slurm('sbatch', '--parsable', str(path), keep=chosen)
  # On a federation the answer is job;cluster.
  return answer.strip().split(';')[0]


def _slurm(*argv: str, keep: Sequence[str] = ()) -> str:
  """What a command of Slurm answers, whatever defaults this shell has for it.

  Args:
    *argv: the command.
    keep: variables with such defaults that count all the same.
  """
  within = 'SLURM_JOB_ID' in os.environ
  environment = {
    name: value
    for name, value in os.environ.items()
    if name in keep or not (_DEFAULTS.match(name) or (within and _OF_A_JOB.match(name)))
  }
  return backend.run_command(argv, environment=environment)


def _max_array_size() -> int:
  match = re.search(
    r'^MaxArraySize\s*=\s*(\d+)',
    _slurm('scontrol', 'show', 'config'),
    re.MULTILINE,
  )
  return int(match.group(1)) if match else _DEFAULT_MAX_ARRAY


def _job_ids(handles: dict[str, Any]) -> list[str]:
  ids = []
  for handle in handles.values():
    ids += [handle] if isinstance(handle, str) else [c['job'] for c in handle]
  return ids


def _jobs(launch: backend.Launch) -> dict[str, tuple[str, str, str]]:
  """(state, nodes, reason) of this run's jobs and array tasks, as far as known."""
  ours = set(_job_ids(launch.handles))
  names = ','.join(f'{launch.program.name}-{r.name}' for r in launch.program.roles)
  text = _slurm(
    'squeue',
    '--noheader',
    '--array',
    '--states=all',
    f'--name={names}',
    '--format=%i|%T|%N|%r',
  )
  found = {}
  for line in text.splitlines():
    job, state, where, reason = (line.strip().split('|') + [''] * 4)[:4]
    if job.split('_')[0] in ours:
      found[job] = (state, where, '' if reason == 'None' else reason)
  if forgotten := ours - {job.split('_')[0] for job in found}:
    try:
      text = _slurm(
        'sacct',
        '--noheader',
        '--parsable2',
        '--allocations',
        '--array',
        f'--jobs={",".join(sorted(forgotten))}',
        f'--name={names}',
        '--format=JobID,State,NodeList',
      )
    except backend.BackendError:  # A cluster without accounting.
      text = ''
    for line in text.splitlines():
      job, state, where = (line.split('|') + [''] * 3)[:3]
      found[job] = ((state.split() or ['GONE'])[0], where, '')
  return found


def _alive(launch: backend.Launch) -> dict[str, str]:
  """'pending' or 'running' by job, of all that has not ended."""
  states = {job: _STATES.get(j[0], 'pending') for job, j in _jobs(launch).items()}
  return {job: s for job, s in states.items() if s in ('pending', 'running')}


def _wait(launch: backend.Launch, jobs: set[str] | None, timeout: float) -> bool:
  """Whether these jobs (None: all) have ended in time."""
  deadline = time.monotonic() + timeout
  while time.monotonic() < deadline:
    left = _alive(launch)
    if not (left.keys() if jobs is None else left.keys() & jobs):
      return True
    time.sleep(1.0)
  return False
