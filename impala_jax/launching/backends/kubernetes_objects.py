"""The Kubernetes objects of a run, as plain dictionaries. Pure.

Learners: a JobSet of one Indexed Job, one pod a host, which restarts as a unit.
Actors: an Indexed Job of its own, so that they come, go and fail one by one. Around
them: a headless Service for the learners' names, two NetworkPolicies that close
everything else, the configuration, and the volume of the run directory. Inference
servers: an Indexed Job, with a Service and a NetworkPolicy of their own.
"""

import pathlib

from impala_jax.launching import program as program_lib
from impala_jax.launching.backends import kubernetes_pods as pods
from impala_jax.runtime.run_directory import RunDirectory

_DISRUPTION = {'type': 'DisruptionTarget', 'status': 'True'}
_MAX_COMPLETIONS = 100_000  # Of an Indexed Job with a back-off per index.
_MAX_CONFIG = 1_000_000  # Bytes; a ConfigMap holds 1 MiB.
_POD_RESTARTS = 6  # By the engine, of one pod; processes restart inside it.


def problems(program: program_lib.Program) -> list[str]:
  """Why the engine could not hold this program."""
  if program.main.name != 'learner':
    return [
      "transport.kind is 'local': the run is one process, and pods need reverb or tcp"
    ]
  found = [
    f'{role.replicas} of {role.name}: an Indexed Job holds {_MAX_COMPLETIONS}'
    for role in program.roles
    if role.replicas > _MAX_COMPLETIONS
  ]
  if len(program.config) > _MAX_CONFIG:
    found.append(
      f'the configuration has {len(program.config)} bytes: a ConfigMap '
      f'holds {_MAX_CONFIG}'
    )
  return found


def objects(
  program: program_lib.Program, options: pods.Options
) -> dict[str, pods.Object]:
  """By short name, in the order in which they must be made."""
  name = program.name
  out = {}
  if not options.claim:
    out['volume'] = _volume(program, options)
  out['config'] = {
    'apiVersion': 'v1',
    'kind': 'ConfigMap',
    'metadata': _meta(program, options, f'{name}-config'),
    'data': {RunDirectory(pathlib.Path(pods.RUN_DIR)).config.name: program.config},
  }
  out['network'] = _closed_network(program, options)
  out['network-learner'] = _learner_network(program, options)
  out['service'] = _service(program, options, 'learner')
  if _servers(program):
    out['network-inference'] = _inference_network(program, options)
    out['service-inference'] = _service(program, options, 'inference')
  for role in program.roles:
    make = _job_set if role.name == 'learner' else _job
    out[role.name] = make(program, options, role)
  return out


def _meta(
  program: program_lib.Program,
  options: pods.Options,
  name: str,
  role: str = '',
) -> pods.Object:
  return {
    'name': name,
    'namespace': options.namespace,
    'labels': pods.labels(program, role),
  }


def _volume(program: program_lib.Program, options: pods.Options) -> pods.Object:
  spec: pods.Object = {
    'accessModes': ['ReadWriteMany'],
    'resources': {'requests': {'storage': f'{options.storage_gib}Gi'}},
  }
  if options.storage_class:
    spec['storageClassName'] = options.storage_class
  return {
    'apiVersion': 'v1',
    'kind': 'PersistentVolumeClaim',
    'metadata': _meta(program, options, f'{program.name}-run'),
    'spec': spec,
  }


def _servers(program: program_lib.Program) -> bool:
  return any(role.name == 'inference' for role in program.roles)


def _service(
  program: program_lib.Program, options: pods.Options, role: str
) -> pods.Object:
  """Names for the pods of a role: the subdomain of their network."""
  served = pods.ports(program, options, role)
  return {
    'apiVersion': 'v1',
    'kind': 'Service',
    'metadata': _meta(program, options, pods.service(program, role), role),
    'spec': {
      'clusterIP': 'None',
      # One that compiles is not ready, and its peers must find it.
      'publishNotReadyAddresses': True,
      'selector': pods.labels(program, role),
      'ports': [
        {'name': n, 'port': p, 'targetPort': p, 'protocol': 'TCP'}
        for n, p in served.items()
      ],
    },
  }


def _closed_network(program: program_lib.Program, options: pods.Options) -> pods.Object:
  """Nothing reaches the run's pods; they reach names and what serves them alone."""
  dns = [{'protocol': p, 'port': 53} for p in ('UDP', 'TCP')]
  serving = ('learner', 'inference') if _servers(program) else ('learner',)
  return {
    'apiVersion': 'networking.k8s.io/v1',
    'kind': 'NetworkPolicy',
    'metadata': _meta(program, options, f'{program.name}-closed'),
    'spec': {
      'podSelector': {'matchLabels': pods.labels(program)},
      'policyTypes': ['Ingress', 'Egress'],
      'ingress': [],
      'egress': [
        {
          'to': [
            {
              'namespaceSelector': {
                'matchLabels': {'kubernetes.io/metadata.name': 'kube-system'}
              },
              'podSelector': {'matchLabels': {'k8s-app': 'kube-dns'}},
            }
          ],
          'ports': dns,
        },
        *(
          {
            'to': [{'podSelector': {'matchLabels': pods.labels(program, role)}}],
            'ports': _tcp(program, options, role),
          }
          for role in serving
        ),
      ],
    },
  }


def _learner_network(
  program: program_lib.Program, options: pods.Options
) -> pods.Object:
  """The run's pods reach the learners' services; learners reach each other."""
  gang = [{'podSelector': {'matchLabels': pods.labels(program, 'learner')}}]
  return {
    'apiVersion': 'networking.k8s.io/v1',
    'kind': 'NetworkPolicy',
    'metadata': _meta(program, options, f'{program.name}-learner', 'learner'),
    'spec': {
      'podSelector': {'matchLabels': pods.labels(program, 'learner')},
      'policyTypes': ['Ingress', 'Egress'],
      'ingress': [
        {
          'from': [{'podSelector': {'matchLabels': pods.labels(program)}}],
          'ports': _tcp(program, options, 'learner'),
        },
        # The learners' own lines and collectives choose their ports.
        {'from': gang},
      ],
      'egress': [{'to': gang}],
    },
  }


def _inference_network(
  program: program_lib.Program, options: pods.Options
) -> pods.Object:
  """The run's actors reach the inference servers; what these reach is in `closed`."""
  actors = {'podSelector': {'matchLabels': pods.labels(program, 'actor')}}
  return {
    'apiVersion': 'networking.k8s.io/v1',
    'kind': 'NetworkPolicy',
    'metadata': _meta(program, options, f'{program.name}-inference', 'inference'),
    'spec': {
      'podSelector': {'matchLabels': pods.labels(program, 'inference')},
      'policyTypes': ['Ingress'],
      'ingress': [{'from': [actors], 'ports': _tcp(program, options, 'inference')}],
    },
  }


def _tcp(
  program: program_lib.Program, options: pods.Options, role: str
) -> list[pods.Object]:
  served = pods.ports(program, options, role).values()
  return [{'protocol': 'TCP', 'port': p} for p in served]


def _job_set(
  program: program_lib.Program, options: pods.Options, role: program_lib.Role
) -> pods.Object:
  job = _job_spec(program, options, role)
  # One pod's failure is the gang's, which the JobSet restarts as a unit.
  job |= {'backoffLimit': 0}
  job['podFailurePolicy'] = {
    'rules': [{'action': 'FailJob', 'onPodConditions': [_DISRUPTION]}]
  }
  return {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2',
    'kind': 'JobSet',
    'metadata': _meta(program, options, program.name, role.name),
    'spec': {
      'network': {
        'enableDNSHostnames': True,
        'subdomain': f'{program.name}-learner',
        'publishNotReadyAddresses': True,
      },
      'failurePolicy': {
        'maxRestarts': _POD_RESTARTS,
        'rules': [
          {
            # A drained or lost host is nobody's fault, however often.
            'name': 'disruption',
            'action': 'RestartJobSetAndIgnoreMaxRestarts',
            'onJobFailureReasons': ['PodFailurePolicy'],
          }
        ],
      },
      'replicatedJobs': [
        {
          'name': role.name,
          'replicas': 1,
          'template': {
            'metadata': {'labels': pods.labels(program, role.name)},
            'spec': job,
          },
        }
      ],
    },
  }


def _job(
  program: program_lib.Program, options: pods.Options, role: program_lib.Role
) -> pods.Object:
  spec = _job_spec(program, options, role)
  spec['backoffLimitPerIndex'] = _POD_RESTARTS
  spec['podFailurePolicy'] = {
    'rules': [{'action': 'Ignore', 'onPodConditions': [_DISRUPTION]}]
  }
  return {
    'apiVersion': 'batch/v1',
    'kind': 'Job',
    'metadata': _meta(program, options, f'{program.name}-{role.name}', role.name),
    'spec': spec,
  }


def _job_spec(
  program: program_lib.Program, options: pods.Options, role: program_lib.Role
) -> pods.Object:
  return {
    'completionMode': 'Indexed',
    'completions': role.replicas,
    'parallelism': role.replicas,
    # Never two of one index: the old pod must be gone first.
    'podReplacementPolicy': 'Failed',
    'template': {
      'metadata': {'labels': pods.labels(program, role.name)},
      'spec': pods.pod(program, options, role),
    },
  }
