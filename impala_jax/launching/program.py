"""A run as data: which roles it has, what each runs, needs and survives.

Backends (`launch/backends`) turn a `Program` into processes, Slurm jobs or Kubernetes
objects. Nothing here starts anything, and there is nothing to pickle.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from impala_jax import config as config_lib
from impala_jax import settings as settings_lib
from impala_jax.runtime import lease

_LEAVE = 20.0  # Seconds for a role to leave a run that has ended.
_EVALUATION = 300.0  # Seconds for the last evaluation and the film.


@dataclasses.dataclass(frozen=True)
class Resources:
  """What one replica asks the engine for; never left to an engine's default."""

  cpus: int = 1
  memory_mib: int = 2048
  gpus: int = 0


@dataclasses.dataclass(frozen=True)
class RestartPolicy:
  """When a process that died is started again in its place.

  Attributes:
    max_restarts: within `window`; one more death ends the replica with its cause.
    window: seconds.
    gang: one replica's death restarts all of them.
    essential: the run ends when the role ends or has failed for good.
  """

  max_restarts: int = 5
  window: float = 600.0
  gang: bool = False
  essential: bool = False


@dataclasses.dataclass(frozen=True)
class Role:
  """One kind of process.

  Attributes:
    name: letters, digits and dashes.
    argv: arguments of the Python interpreter; the same on every backend.
    replicas: how many; they are told their IMPALA_INDEX.
    resources: of one replica.
    restart: see `RestartPolicy`.
    grace: seconds between SIGTERM and SIGKILL.
    linger: seconds that it may go on after the run has ended.
    ports: names of the TCP ports that the role serves; the numbers are a backend's
      choice and come as IMPALA_<NAME>_PORT.
    elastic: replicas may be added and removed while the run goes on.
  """

  name: str
  argv: tuple[str, ...]
  replicas: int
  resources: Resources
  restart: RestartPolicy
  grace: float
  linger: float = 0.0
  ports: tuple[str, ...] = ()
  elastic: bool = False

  @property
  def one_by_one(self) -> bool:
    """Whether it has replicas that come and go by themselves."""
    return self.elastic or (self.replicas > 1 and not self.restart.gang)


@dataclasses.dataclass(frozen=True)
class Program:
  """A whole run.

  Attributes:
    name: that no other run has, see `run_name`; a DNS label of at most 40 characters.
    roles: with distinct names.
    run_dir: absolute path of the run directory, the same on all hosts.
    work_dir: absolute path of a directory from which the package can be imported.
    first_incarnation: above all that earlier launches have used.
    config: what `config.json` must hold where the run directory is a new volume.
  """

  name: str
  roles: tuple[Role, ...]
  run_dir: str
  work_dir: str
  first_incarnation: int = 0
  config: str = ''

  @property
  def main(self) -> Role:
    """The one whose end is the run's."""
    return next(r for r in self.roles if r.restart.essential)

  def role(self, name: str) -> Role:
    """Raises KeyError with the roles that there are."""
    for role in self.roles:
      if role.name == name:
        return role
    known = ', '.join(r.name for r in self.roles)
    raise KeyError(f'no role {name!r} in this run: it has {known}')

  def scaled(self, name: str, replicas: int) -> 'Program':
    """The same with another number of replicas of one role.

    Raises:
      ValueError: the role is not elastic, or `replicas` is below 1.
    """
    role = self.role(name)
    if not role.elastic:
      raise ValueError(f'role {name} has {role.replicas} and cannot be scaled')
    if replicas < 1:
      raise ValueError(f'{name}: {replicas} replicas: must be at least 1')
    roles = tuple(
      dataclasses.replace(r, replicas=replicas) if r is role else r for r in self.roles
    )
    return dataclasses.replace(self, roles=roles)


def program_of(
  config: config_lib.Config,
  run_dir: pathlib.Path | str,
  work_dir: pathlib.Path | str,
  name: str,
  launches: int = 0,
  learners: int = 1,
  resources: Mapping[str, Resources] | None = None,
  learner_grace: float = 120.0,
  max_restarts: int = 5,
) -> Program:
  """The roles of a run: learner gang, inference servers, actors, evaluator.

  With the local transport all of them are threads of one process, the role `all`.

  Args:
    config: of the run.
    run_dir: its directory; made absolute.
    work_dir: see `Program`; made absolute.
    name: see `Program`.
    launches: how often the run was launched before.
    learners: learner processes, one a host.
    resources: by role name; what is missing takes the defaults.
    learner_grace: seconds a learner gets to write its checkpoint.
    max_restarts: see `RestartPolicy`.

  Raises:
    config_lib.ConfigError: the settings cannot run as so many processes, or a path
      cannot be written in a script.
  """
  problems = [
    f'{field} is {str(path)!r}: must hold no control characters'
    for field, path in (('run_dir', run_dir), ('work_dir', work_dir))
    if settings_lib.has_control_characters(str(path))
  ]
  one_process = config.transport.kind == 'local'
  if learners < 1:
    problems.append(f'learners is {learners}: must be at least 1')
  else:
    if one_process and learners > 1:
      problems.append(
        f'learners is {learners}: with transport.kind local the run is one process'
      )
    try:
      config_lib.validate(config, learners=learners)
    except config_lib.ConfigError as e:
      problems.append(str(e))
  if problems:
    raise config_lib.ConfigError('\n'.join(problems))
  resources = resources or {}

  def role(name: str, replicas: int = 1, **fields: Any) -> Role:
    essential = name in ('learner', 'all')
    restart = RestartPolicy(
      max_restarts=max_restarts,
      gang=name == 'learner' and learners > 1,
      essential=essential,
    )
    fields = {'grace': 30.0, 'linger': 0.0 if essential else _LEAVE} | fields
    return Role(
      name=name,
      argv=('-m', 'impala_jax.distributed.roles.run', name),
      replicas=replicas,
      resources=resources.get(name, Resources()),
      restart=restart,
      **fields,
    )

  if one_process:
    # Its last evaluation and the film are within the time that it is given to end.
    roles = [role('all', grace=learner_grace + _EVALUATION)]
  else:
    roles = [role('learner', learners, grace=learner_grace, ports=('control', 'queue'))]
    if servers := config.inference.servers:
      roles.append(role('inference', servers, ports=('inference',)))
    roles.append(role('actor', config.actor.num_actors, elastic=True))
    if config.evaluator.enabled:
      roles.append(role('evaluator', linger=_EVALUATION))
  run_dir = pathlib.Path(run_dir).absolute()
  return Program(
    name=name,
    roles=tuple(roles),
    run_dir=str(run_dir),
    work_dir=str(pathlib.Path(work_dir).absolute()),
    # The supervisor of one launch counts up from here.
    first_incarnation=lease.first_incarnation(launches),
    config=json.dumps({'config': config_lib.to_dict(config), 'launches': launches}),
  )


def to_dict(program: Program) -> dict[str, Any]:
  return dataclasses.asdict(program)


def from_dict(data: Mapping[str, Any]) -> Program:
  """The inverse of `to_dict`, after a trip through JSON."""
  roles = tuple(
    Role(
      **{
        **r,
        'argv': tuple(r['argv']),
        'ports': tuple(r['ports']),
        'resources': Resources(**r['resources']),
        'restart': RestartPolicy(**r['restart']),
      }
    )
    for r in data['roles']
  )
  return Program(**{**data, 'roles': roles})
