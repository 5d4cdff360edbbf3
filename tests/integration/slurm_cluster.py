"""A real Slurm on this machine: one controller, several nodes, own ports and files.

Neither munge nor cgroups nor accounting are needed. Nodes are slurmd processes; a
node is lost by killing it and all that it runs.
"""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import time

import psutil

NEEDED = ('slurmctld', 'slurmd', 'sbatch', 'squeue', 'scontrol')

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
KillWait=15
JobRequeue=1
MaxArraySize={max_array}
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
  """Why there can be no cluster here; empty if there can."""
  absent = [name for name in NEEDED if shutil.which(name) is None]
  if absent:
    return f'not installed: {", ".join(absent)} (Debian: slurm-wlm)'
  return '' if os.geteuid() == 0 else 'slurmd needs root'


class Cluster:
  """Started by the constructor; `close` ends all that ran in it.

  Args:
    folder: for configuration, state and logs.
    nodes: how many, named n0, n1, ...
    cpus: of each.
    max_array: Slurm's MaxArraySize.
  """

  def __init__(self, folder: pathlib.Path, nodes: int, cpus: int, max_array: int):
    self.folder = folder
    self._processes: dict[str, subprocess.Popen[bytes]] = {}
    host = socket.gethostname().split('.')[0]
    ports = _free_ports(nodes + 1)
    lines = [
      f'NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[i + 1]} '
      f'CPUs={cpus} RealMemory=8000 State=UNKNOWN'
      for i in range(nodes)
    ]
    (folder / 'state').mkdir()
    (folder / 'cgroup.conf').write_text('CgroupPlugin=cgroup/v1\n')
    conf = folder / 'slurm.conf'
    conf.write_text(
      _CONF.format(
        host=host,
        port=ports[0],
        max_array=max_array,
        folder=folder,
        nodes='\n'.join(lines),
      )
    )
    self.environment = {'SLURM_CONF': str(conf)}
    self._start('slurmctld', ['slurmctld', '-D', '-f', str(conf)])
    self.nodes = [f'n{i}' for i in range(nodes)]
    for node in self.nodes:
      self.start_node(node)
    self._wait_until_idle()

  def start_node(self, node: str) -> None:
    self._start(
      node, ['slurmd', '-D', '-N', node, '-f', self.environment['SLURM_CONF']]
    )

  def lose_node(self, node: str) -> None:
    """As if its power were cut; Slurm finds out by itself after SlurmdTimeout."""
    slurmd = self._processes.pop(node)
    slurmd.kill()
    slurmd.wait()
    _kill_jobs([p for p in self._ours() if _environment(p, 'SLURMD_NODENAME') == node])

  def command(self, *argv: str) -> str:
    done = subprocess.run(
      argv,
      env={**os.environ, **self.environment},
      capture_output=True,
      text=True,
      timeout=30,
      check=False,
    )
    if done.returncode:
      raise RuntimeError(f'{argv}: {done.stderr.strip()}')
    return done.stdout

  def close(self) -> None:
    for process in self._processes.values():
      process.terminate()
    for process in self._processes.values():
      try:
        process.wait(10)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _kill_jobs(self._ours())

  def running(self) -> list[str]:
    """Command lines of the jobs' processes, for a test that none is left."""
    found = []
    for process in self._ours():
      with contextlib.suppress(psutil.NoSuchProcess):  # It has ended meanwhile.
        found.append(' '.join(process.cmdline()))
    return found

  def _start(self, name: str, argv: list[str]) -> None:
    with open(self.folder / f'{name}.out', 'ab') as out:
      self._processes[name] = subprocess.Popen(
        argv,
        env={**os.environ, **self.environment},
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=out,
        start_new_session=True,
      )

  def _wait_until_idle(self) -> None:
    deadline = time.monotonic() + 30
    text = ''
    while time.monotonic() < deadline:
      try:
        text = self.command('sinfo', '--noheader', '--Node', '--format=%N %T')
      except RuntimeError as e:
        text = str(e)
      if text.count(' idle') == len(self.nodes):
        return
      time.sleep(0.3)
    self.close()
    logs = (self.folder / 'slurmctld.log').read_text()[-2000:]
    raise RuntimeError(f'Slurm did not come up: {text}\n{logs}')

  def _ours(self) -> list[psutil.Process]:
    """The jobs' processes, however deep."""
    return [
      p
      for p in psutil.process_iter()
      if _environment(p, 'SLURM_CONF') == self.environment['SLURM_CONF']
      and _environment(p, 'SLURM_JOB_ID')
    ]


def _environment(process: psutil.Process, name: str) -> str:
  try:
    return process.environ().get(name, '')
  except psutil.Error:
    return ''


def _kill_jobs(processes: list[psutil.Process]) -> None:
  """SIGKILL; to slurmstepd first, so that it tells nobody how its job ended."""
  steps = set()
  for process in processes:
    with contextlib.suppress(psutil.Error):
      steps |= {p for p in process.parents() if p.name() == 'slurmstepd'}
  for process in [*steps, *processes]:
    with contextlib.suppress(psutil.Error):
      process.kill()


def _free_ports(count: int) -> list[int]:
  sockets = [socket.socket() for _ in range(count)]
  try:
    for s in sockets:
      s.bind(('127.0.0.1', 0))
    return [s.getsockname()[1] for s in sockets]
  finally:
    for s in sockets:
      s.close()
