"""What this machine can hold of a run: processes, memory, cores.

The figures are those of docs/performance.md, rounded up. They are for refusing what
cannot work, a thousand actors on a laptop; what they let pass may still be slow.
"""

import math
import os
import pathlib
import re
import resource
from typing import NamedTuple

import psutil

from impala_jax import config as config_lib


class Cost(NamedTuple):
  """What something takes of a machine."""

  processes: int = 0
  threads: int = 0  # Which the kernel's limits count.
  gib: float = 0.0  # Of memory.

  def times(self, count: int) -> 'Cost':
    return Cost(self.processes * count, self.threads * count, self.gib * count)

  def plus(self, other: 'Cost') -> 'Cost':
    return Cost(
      self.processes + other.processes,
      self.threads + other.threads,
      self.gib + other.gib,
    )


class Machine(NamedTuple):
  """What there is."""

  threads: int  # That a user may have.
  gib: float  # Of memory.
  cores: int  # That a process may use.


_LEARNER = {'deep': Cost(1, 70, 2.8)}
_LEARNER_ELSE = Cost(1, 70, 0.9)
_PROCESS = Cost(1, 17, 0.2)  # Actor, evaluator or server, without environments.
_THREAD = Cost(0, 1, 0.0)  # An actor of the local transport.
# One environment, with what its actor keeps for it. The threads of a DeepMind Lab
# engine are a guess.
_ENVIRONMENTS = {'dmlab': Cost(1, 3, 0.24), 'doom': Cost(2, 5, 0.05)}
_ENVIRONMENTS_ELSE = Cost(0, 0, 0.0015)
# Bytes of a time step that travels, of the suites' own frames.
_STEPS = {'atari': 7_100, 'dmlab': 21_000, 'doom': 21_000, 'procgen': 12_300}
_STEP_ELSE = 100
# So many together did that many times the work of one, with environments that mostly
# sleep (`scaling_benchmark`); with busy ones, one a core is all that is of use.
_ACTORS_A_CORE = 16
_CGROUP = '/sys/fs/cgroup'


def this_machine() -> Machine:
  """With the limits of the user and of the container, where there are any."""
  soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
  threads = min(
    _number('/proc/sys/kernel/pid_max'),
    _number(f'{_CGROUP}/pids.max'),
    math.inf if soft == resource.RLIM_INFINITY else soft,
  )
  memory = min(psutil.virtual_memory().total, _number(f'{_CGROUP}/memory.max'))
  return Machine(
    2**22 if math.isinf(threads) else int(threads),
    memory / 2**30,
    len(psutil.Process().cpu_affinity()) if psutil.LINUX else os.cpu_count() or 1,
  )


def problems(
  config: config_lib.Config, command: str, machine: Machine | None = None
) -> list[str]:
  """Why the machine cannot hold the run, with the arithmetic and what to type instead.

  Args:
    config: of the run; each actor plays `actor.envs_per_actor` environments.
    command: what the user typed.
    machine: default `this_machine`.

  Returns:
    One text of several lines; none where the machine can hold it.
  """
  machine = machine or this_machine()
  actors, envs = config.actor.num_actors, config.actor.envs_per_actor
  if actors < 1 or envs < 1:
    return []  # Which is another problem.
  environment = _ENVIRONMENTS.get(config.environment.suite, _ENVIRONMENTS_ELSE)
  apart = config.transport.kind != 'local'  # Roles are processes of their own.
  actor = (_PROCESS if apart else _THREAD).plus(environment.times(envs))
  rest = _LEARNER.get(config.network.torso, _LEARNER_ELSE).plus(_batches(config))
  if apart:
    rest = rest.plus(_PROCESS.times(config.inference.servers))
  if config.evaluator.enabled:
    rest = rest.plus(_PROCESS if apart else _THREAD)
    rest = rest.plus(environment.times(config.evaluator.processes))
  fit = {
    'processes': (machine.threads - rest.threads) // actor.threads,
    'memory': math.floor((machine.gib - rest.gib) / actor.gib),
    'cores': _ACTORS_A_CORE * machine.cores,
  }
  most = min(fit.values())
  if actors <= most:
    return []
  total = rest.plus(actor.times(actors))
  lines = [
    (f'{actors:,} actors are' if most >= 1 else 'the run is')
    + ' more than this machine holds:',
    f'  processes  {total.processes:,} with {total.threads:,} threads of '
    f'{machine.threads:,}: {actor.processes} with {actor.threads} for each actor, '
    f'{rest.processes} with {rest.threads} for the rest',
    f'  memory     {total.gib:,.1f} GiB of {machine.gib:,.1f}: {actor.gib:.2g} for '
    f'each actor of {envs} environments, {rest.gib:.2g} for the rest',
    f'  cores      {machine.cores}: {actors / machine.cores:,.0f} actors a core, where '
    f'{_ACTORS_A_CORE} were of use with environments that mostly sleep',
  ]
  if most >= 1:
    fewer = re.sub(r'\s--num_actors[ =]\S+', '', command)
    by = ', '.join(name for name, count in fit.items() if count == most)
    lines.append(f'at most {most:,} fit ({by}): {fewer} --num_actors={most}')
  lines += [
    f'on a cluster: {command} --launcher=slurm --dry_run',
    f'all the same, here: {command} --oversubscribe',
  ]
  return ['\n'.join(lines)]


def _batches(config: config_lib.Config) -> Cost:
  """The learner's queue, batches and parameters, beyond what is usual."""
  step = _STEPS.get(config.environment.suite, _STEP_ELSE)
  unrolls = config.queue_capacity + 2 * config.learner.batch_size
  hidden, lstm = config.network.hidden, config.network.lstm
  parameters = 2_500 * hidden + 4 * lstm * (hidden + lstm)
  size = unrolls * (config.actor.unroll_length + 1) * step + 20 * parameters
  return Cost(gib=max(0.0, size / 2**30 - 1.0))


def _number(path: str) -> float:
  """What the kernel says there; infinite for `max`, or where there is no such file."""
  try:
    return float(pathlib.Path(path).read_text())
  except (OSError, ValueError):
    return math.inf
