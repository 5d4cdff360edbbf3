"""The processes of a run that the local launcher started, and what they leave behind.

They are found from the run's own records: `launch.json` has the supervisors, and their
descendants say in their environment which replica they are.
"""

import dataclasses
import json
import pathlib
import subprocess
import time
from typing import Any, NamedTuple

import psutil

from impala_jax.runtime import files

_COMMAND = 'impala_jax.distributed.roles.run'


@dataclasses.dataclass(frozen=True)
class Replica:
  """One process of a role."""

  role: str
  index: int

  @property
  def name(self) -> str:
    return f'{self.role}-{self.index}'


class Supervisor(NamedTuple):
  """The process above a replica: of several learners, one above all of them.

  Attributes:
    process: it.
    slot: its place in the handles of its role in `launch.json`.
    argv: its command.
    environment: its variables.
  """

  process: psutil.Process
  slot: int
  argv: list[str]
  environment: dict[str, str]


def supervisor(run_dir: pathlib.Path, replica: Replica) -> Supervisor | None:
  """That of a replica; None while there is none."""
  handles = _launch(run_dir)['handles'][replica.role]
  slot = min(replica.index, len(handles) - 1)  # A gang of learners has one.
  try:
    process = psutil.Process(handles[slot]['pid'])
    if abs(process.create_time() - handles[slot]['created']) > 1.0:
      return None
    if process.status() == psutil.STATUS_ZOMBIE:
      return None
    return Supervisor(process, slot, process.cmdline(), process.environ())
  except psutil.Error:
    return None


def role_process(run_dir: pathlib.Path, replica: Replica) -> psutil.Process | None:
  """The process that does the work of a replica; None while there is none."""
  above = supervisor(run_dir, replica)
  if above is None:
    return None
  try:
    below = above.process.children(recursive=True)
  except psutil.Error:
    return None
  return next((p for p in below if _is_role(p, replica)), None)


def incarnation(process: psutil.Process) -> int:
  """-1 where it has ended."""
  try:
    return int(process.environ().get('IMPALA_INCARNATION', '-1'))
  except psutil.Error:
    return -1


def start_again(
  run_dir: pathlib.Path, replica: Replica, before: Supervisor
) -> subprocess.Popen[bytes]:
  """Starts a supervisor in the place of one that has ended, as an engine would.

  The local launcher has no engine that looks after supervisors: this stands in for
  Slurm's requeue, and keeps `launch.json` true.
  """
  with open(run_dir / 'logs' / 'supervisors.log', 'ab') as log:
    process = subprocess.Popen(
      before.argv,
      env=before.environment,
      cwd=_launch(run_dir)['program']['work_dir'],
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=log,
      start_new_session=True,
    )
  launch = _launch(run_dir)
  launch['handles'][replica.role][before.slot] = {
    'pid': process.pid,
    'created': psutil.Process(process.pid).create_time(),
  }
  files.write_json(run_dir / 'launch.json', launch)
  return process


def sample(process: psutil.Process) -> dict[str, float] | None:
  """Memory (MB), descriptors and threads of a process; None where it has ended."""
  try:
    with process.oneshot():
      memory: Any = process.memory_full_info()
      return {
        'time': time.time(),
        'pid': process.pid,
        'born': process.create_time(),
        'rss_mb': memory.rss / 2**20,
        'pss_mb': memory.pss / 2**20,
        'descriptors': process.num_fds(),
        'threads': process.num_threads(),
      }
  except psutil.Error:
    return None


def of_run(run_dir: pathlib.Path) -> list[psutil.Process]:
  """All processes that live and were started for this run."""
  found = []
  for process in psutil.process_iter():
    try:
      if process.status() != psutil.STATUS_ZOMBIE and (
        process.environ().get('IMPALA_RUN_DIR') == str(run_dir)
      ):
        found.append(process)
    except psutil.Error:
      continue
  return found


def shared_memory() -> set[str]:
  """Names of the machine's shared memory that no living process uses."""
  used = set()
  for maps in pathlib.Path('/proc').glob('[0-9]*/maps'):
    try:
      text = maps.read_text()
    except OSError:
      continue
    used |= {line.split()[-1] for line in text.splitlines() if ' /dev/shm/' in line}
  return {p.name for p in pathlib.Path('/dev/shm').iterdir() if str(p) not in used}


def left_behind(run_dir: pathlib.Path, shared_before: set[str]) -> list[str]:
  """What of an ended run is still there: processes, shared memory, temporary files.

  Args:
    run_dir: of the run; its temporary files go to `tmp` in it.
    shared_before: `shared_memory` before the run.
  """
  return [
    *(f'process {p.pid}: {" ".join(p.cmdline())}' for p in of_run(run_dir)),
    *(f'shared memory {name}' for name in sorted(shared_memory() - shared_before)),
    *(f'temporary file {p.name}' for p in sorted((run_dir / 'tmp').iterdir())),
  ]


def _launch(run_dir: pathlib.Path) -> dict[str, Any]:
  return json.loads((run_dir / 'launch.json').read_text())


def _is_role(process: psutil.Process, replica: Replica) -> bool:
  try:
    # The whole of it: supervisors name the command that they run.
    return (
      process.cmdline()[1:] == ['-m', _COMMAND, replica.role]
      and process.environ().get('IMPALA_INDEX') == str(replica.index)
      and process.status() != psutil.STATUS_ZOMBIE
    )
  except psutil.Error:
    return False
