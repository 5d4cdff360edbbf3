"""The batch scripts of a run. Pure.

A job's shell becomes the supervisor itself (`exec`), so that Slurm's signals reach it.
"""

import dataclasses
import re
import shlex

from impala_jax.launching import program as program_lib
from impala_jax.launching import supervision
from impala_jax.launching.backends import backend
from impala_jax.runtime import role_environment
from impala_jax.settings import NOT_NEGATIVE, Constraint, setting

_DEFAULT_MAX_ARRAY = 1001  # Slurm's own default.


@dataclasses.dataclass(frozen=True)
class Options(backend.Options):
  """Empty texts leave the choice to the cluster."""

  partition: str = setting('', 'Jobs go to this partition.')
  learner_partition: str = setting('', 'That of the learners, where it differs.')
  inference_partition: str = setting(
    '', 'That of the inference servers, where it differs.'
  )
  account: str = setting('', 'Jobs are charged to this account.')
  qos: str = setting('', 'Jobs have this quality of service.')
  constraint: str = setting('', 'Nodes have these features.')
  time_limit: str = setting(
    '', 'As sbatch takes it. Jobs are requeued when it is near.'
  )
  extra: str = setting(
    '',
    'More arguments of sbatch for every job, as in a shell.',
    Constraint('must be arguments, quoted as in a shell', lambda x: _splits(x)),
  )
  array_throttle: int = setting(
    0, 'At most so many actors of one array run at once. All, if it is 0.', NOT_NEGATIVE
  )
  max_array_size: int = setting(
    0,
    'An array has at most so many actors. Slurm is asked when submitting, if it is 0.',
    NOT_NEGATIVE,
  )


def _splits(text: str) -> bool:
  try:
    shlex.split(text)
  except ValueError:
    return False
  return True


def render(program: program_lib.Program, options: Options) -> dict[str, str]:
  """One script a role; of several replicas one for each array.

  Raises:
    backend.BackendError: no script can say where its output goes.
  """
  if '\\' in program.run_dir:
    # There Slurm writes %j, and not a number, into the name of the file.
    raise backend.BackendError(
      f'run_dir is {program.run_dir!r}: must hold no backslash on Slurm'
    )
  files = {}
  for role in program.roles:
    if not role.one_by_one:
      files[f'{role.name}.sbatch'] = _script(program, options, role)
      continue
    for first, count in chunks(options, 0, role.replicas):
      script = array(program, options, role, first, count)
      files[file_name(role.name, first)] = script
  return files


def chunks(options: Options, first: int, end: int) -> list[tuple[int, int]]:
  """(first replica, count) of each array that holds some of [first, end)."""
  size = options.max_array_size or _DEFAULT_MAX_ARRAY
  return [(i, min(size, end - i)) for i in range(first, end, size)]


def array(
  program: program_lib.Program,
  options: Options,
  role: program_lib.Role,
  first: int,
  count: int,
) -> str:
  """The script of the replicas from `first` on, as tasks from 0 on."""
  # Actors may take turns; what they wait for may not.
  throttle = options.array_throttle if role.elastic else 0
  tasks = f'0-{count - 1}' + (f'%{throttle}' if throttle else '')
  return _script(program, options, role, tasks, first)


def _script(
  program: program_lib.Program,
  options: Options,
  role: program_lib.Role,
  array: str = '',
  first: int = 0,
) -> str:
  nodes = role.replicas if role.restart.gang else 1
  partition = options.partition
  if role.name in ('learner', 'inference'):
    partition = getattr(options, f'{role.name}_partition') or partition
  logs = f'{program.run_dir}/logs'.replace('%', '%%')
  wanted = {
    'job-name': f'{program.name}-{role.name}',
    'array': array,
    'chdir': program.work_dir,
    'output': f'{logs}/slurm-%x-{"%A_%a" if array else "%j"}.out',
    'open-mode': 'append',
    'nodes': nodes,
    'ntasks': nodes,
    'ntasks-per-node': 1,
    'cpus-per-task': role.resources.cpus,
    'mem': f'{role.resources.memory_mib}M',
    'gres': f'gpu:{role.resources.gpus}' if role.resources.gpus else '',
    # To the supervisor alone, which ends its process and requeues the job.
    'signal': f'B:USR1@{round(role.grace) + 60}',
    'time': options.time_limit,
    'partition': partition,
    'account': options.account,
    'qos': options.qos,
    'constraint': options.constraint,
  }
  lines = ['#!/bin/bash', '#SBATCH --requeue']
  lines += [f'#SBATCH --{k}={_quoted(v)}' for k, v in wanted.items() if v != '']
  lines += [f'#SBATCH {_quoted(word)}' for word in shlex.split(options.extra)]
  variables = role_environment.variables(
    run_dir=program.run_dir, count=program.main.replicas
  )
  lines += [
    'set -e',
    *(f'export {k}={shlex.quote(v)}' for k, v in variables.items()),
    # Whatever it says, it ends there.
    *([f'eval {shlex.quote(options.setup)}'] if options.setup else []),
    f'exec {shlex.join(_command(program, options, role, bool(array), first, nodes))}',
  ]
  return '\n'.join(lines) + '\n'


def _command(
  program: program_lib.Program,
  options: Options,
  role: program_lib.Role,
  array: bool,
  first: int,
  nodes: int,
) -> list[str]:
  python = options.python
  # Told by the task's own index where the role is an array.
  from_task = 'SLURM_ARRAY_TASK_ID' if array else ''
  settings = supervision.settings_of(
    program, role, python, first, index_from=from_task, slurm_host=True
  )
  if nodes > 1:
    # One supervisor on each node, whose end is the end of all; one above them.
    each = dataclasses.replace(
      settings, index_from='SLURM_PROCID', once=True, essential=False, max_restarts=0
    )
    gang = [
      'srun',
      f'--ntasks={nodes}',
      f'--cpus-per-task={role.resources.cpus}',
      '--kill-on-bad-exit=1',
      *supervision.command(python, each),
    ]
    settings = dataclasses.replace(
      settings,
      role=f'{role.name}-gang',
      command=tuple(gang),
      grace=role.grace + 15.0,
      slurm_host=False,
      # srun hands SIGUSR1 on; SIGTERM would kill its tasks.
      stop_signal='SIGUSR1',
    )
  return supervision.command(python, settings)


def file_name(role: str, first: int, generation: int = 0) -> str:
  return f'{role}-{first:06d}' + (f'-{generation}' if generation else '') + '.sbatch'


def _quoted(value: object) -> str:
  """As sbatch reads its lines, which is not quite as a shell does."""
  text = str(value)
  if re.fullmatch(r'[-\w./=][-\w./:=,@%+]*', text, re.ASCII):
    return text
  return '"' + re.sub(r'(["\\])', r'\\\1', text) + '"'
