"""The pods of a run and what they are told, as plain dictionaries. Pure."""

import dataclasses
import pathlib
import re
import shlex
from typing import Any

from impala_jax.launching import program as program_lib
from impala_jax.launching import supervision
from impala_jax.launching.backends import backend
from impala_jax.runtime import role_environment
from impala_jax.runtime.run_directory import RunDirectory
from impala_jax.settings import NOT_EMPTY, Constraint, at_least, setting, within

RUN_LABEL = 'impala-jax/run'
ROLE_LABEL = 'impala-jax/role'
INDEX = 'batch.kubernetes.io/job-completion-index'
RUN_DIR = '/impala-run'
_CONFIG = RunDirectory(pathlib.Path(RUN_DIR)).config
_LABEL = re.compile(r'[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?')

Object = dict[str, Any]

_IS_LABEL = Constraint('must be a DNS label', lambda x: bool(_LABEL.fullmatch(x)))
_EMPTY_OR_LABEL = Constraint(
  'must be empty or a DNS label', lambda x: not x or bool(_LABEL.fullmatch(x))
)
_IMAGE = Constraint('must name an image', lambda x: bool(x) and not re.search(r'\s', x))


@dataclasses.dataclass(frozen=True)
class Options(backend.Options):
  """Where the pods run and what they are given."""

  python: str = setting('python', 'The interpreter in the image.', NOT_EMPTY)
  image: str = setting(
    'impala_jax:latest', 'Containers are made of this image.', _IMAGE
  )
  work_dir: str = setting(
    '/impala', 'In this folder of the image the package can be imported.', NOT_EMPTY
  )
  namespace: str = setting('default', 'Objects are made in this namespace.', _IS_LABEL)
  context: str = setting(
    '', "This context of kubectl's configuration is used. The current one, if empty."
  )
  claim: str = setting(
    '',
    'An existing volume claim, ReadWriteMany. If empty, one is made.',
    _EMPTY_OR_LABEL,
  )
  storage_class: str = setting('', 'The claim that is made is of this class.')
  storage_gib: int = setting(50, 'It asks for so much.', at_least(1))
  accelerator: str = setting(
    'nvidia.com/gpu', 'This resource is what learner_gpus counts.', NOT_EMPTY
  )
  node_selector: tuple[str, ...] = setting(
    (),
    'Labels key=value of the nodes of learners, and of inference servers with '
    'accelerators.',
    Constraint(
      'must be key=value, separated by commas',
      lambda x: all(s.count('=') == 1 for s in x),
    ),
  )
  pull_secret: str = setting(
    '', 'The image is pulled with this secret.', _EMPTY_OR_LABEL
  )
  user: int = setting(
    1000, 'Processes run as this user, which is not root.', within(1, 2**31 - 1)
  )
  base_port: int = setting(
    8470,
    'The port of control. Those of queue and inference servers follow.',
    within(1024, 65_000),
  )


def labels(program: program_lib.Program, role: str = '') -> dict[str, str]:
  run = {'app.kubernetes.io/name': 'impala-jax', RUN_LABEL: program.name}
  return {**run, ROLE_LABEL: role} if role else run


def ports(
  program: program_lib.Program, options: Options, role: str = 'learner'
) -> dict[str, int]:
  """Of a role, by name; no two roles have the same."""
  number = options.base_port
  for other in program.roles:
    if other.name == role:
      return {name: number + i for i, name in enumerate(other.ports)}
    number += len(other.ports)
  return {}


def service(program: program_lib.Program, role: str) -> str:
  """Name of the headless Service by which pods of a role that serves are found."""
  return f'{program.name}-{role}'


def pod(
  program: program_lib.Program, options: Options, role: program_lib.Role
) -> Object:
  spec: Object = {
    'restartPolicy': 'Never',
    # The supervisor's margin over its process.
    'terminationGracePeriodSeconds': round(role.grace) + 15,
    'automountServiceAccountToken': False,
    'enableServiceLinks': False,
    'securityContext': {
      'runAsNonRoot': True,
      'runAsUser': options.user,
      'runAsGroup': options.user,
      'fsGroup': options.user,
      'seccompProfile': {'type': 'RuntimeDefault'},
    },
    'containers': [_container(program, options, role)],
    'volumes': [
      {
        'name': 'run',
        'persistentVolumeClaim': {'claimName': options.claim or f'{program.name}-run'},
      },
      {'name': 'config', 'configMap': {'name': f'{program.name}-config'}},
      {'name': 'tmp', 'emptyDir': {}},
    ],
  }
  if options.pull_secret:
    spec['imagePullSecrets'] = [{'name': options.pull_secret}]
  if role.name == 'inference':
    # With the host name that an Indexed Job gives, pods have names in the network.
    spec['subdomain'] = service(program, role.name)
  accelerated = role.name == 'inference' and role.resources.gpus
  if (role.name == 'learner' or accelerated) and options.node_selector:
    spec['nodeSelector'] = dict(s.split('=') for s in options.node_selector)
  return spec


def _container(
  program: program_lib.Program, options: Options, role: program_lib.Role
) -> Object:
  resources = {
    'cpu': str(role.resources.cpus),
    'memory': f'{role.resources.memory_mib}Mi',
  }
  if role.resources.gpus:
    resources[options.accelerator] = str(role.resources.gpus)
  container: Object = {
    'name': role.name,
    'image': options.image,
    'workingDir': options.work_dir,
    'command': _command(program, options, role),
    'env': _environment(program, options, role),
    # A copy, or YAML would show a reference.
    'resources': {'requests': resources, 'limits': dict(resources)},
    'securityContext': {
      'allowPrivilegeEscalation': False,
      'readOnlyRootFilesystem': True,
      'capabilities': {'drop': ['ALL']},
    },
    'volumeMounts': [
      {'name': 'run', 'mountPath': RUN_DIR, 'subPath': program.name},
      {
        'name': 'config',
        'mountPath': str(_CONFIG),
        'subPath': _CONFIG.name,
        'readOnly': True,
      },
      {'name': 'tmp', 'mountPath': '/tmp'},
    ],
  }
  if role.ports:
    container['ports'] = [
      {'name': n, 'containerPort': p, 'protocol': 'TCP'}
      for n, p in ports(program, options, role.name).items()
    ]
  return container


def _command(
  program: program_lib.Program, options: Options, role: program_lib.Role
) -> list[str]:
  gang = role.restart.gang
  settings = supervision.settings_of(
    program,
    role,
    options.python,
    index_from='IMPALA_INDEX',
    once=gang,
    max_restarts=0 if gang else role.restart.max_restarts,
  )
  command = supervision.command(options.python, settings)
  if options.setup:
    script = f'eval {shlex.quote(options.setup)}\nexec "$@"'
    command = ['/bin/sh', '-c', script, 'sh', *command]
  # Kubernetes reads $(NAME) and $$ before a shell does.
  return [word.replace('$', '$$') for word in command]


def _environment(
  program: program_lib.Program, options: Options, role: program_lib.Role
) -> list[Object]:
  named = lambda **fields: [
    {'name': k, 'value': v} for k, v in role_environment.variables(**fields).items()
  ]
  env: list[Object] = [
    {
      'name': 'IMPALA_INDEX',
      'valueFrom': {'fieldRef': {'fieldPath': f"metadata.annotations['{INDEX}']"}},
    },
    *named(run_dir=RUN_DIR, count=program.main.replicas),
    # The root file system is read-only.
    {'name': 'HOME', 'value': '/tmp'},
  ]
  if role.ports:
    served = ports(program, options, role.name)
    # A JobSet numbers its jobs, too.
    job = '-0' if role.name == 'learner' else ''
    domain = service(program, role.name)
    host = f'{program.name}-{role.name}{job}-$(IMPALA_INDEX).{domain}'
    env += named(host=host, **{f'{n}_port': p for n, p in served.items()})
  return env
