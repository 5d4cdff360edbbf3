"""The manifests, strictly and offline: schemas, and the rules that schemas lack."""

import copy
import dataclasses
import pathlib
import re

import pytest
import yaml

from impala_jax import config as config_lib
from impala_jax.launching import backends, run_name
from impala_jax.launching import program as program_lib
from impala_jax.launching.backends import backend, kubernetes_pods
from tests.launching import jobset_schema, programs

VERSIONS = ('1.29', '1.33', '1.37')


def render(program, *settings):
  files = backends.get('kubernetes', settings).render(program)
  return {n: yaml.safe_load(text) for n, text in files.items()}


def by_name(program, *settings):
  found = render(program, *settings).values()
  return {f'{o["kind"]}/{o["metadata"]["name"]}': o for o in found}


def validate(item, version):
  """Kubernetes' own schema, unknown fields refused; a JobSet also by ours."""
  kubernetes_validate = pytest.importorskip('kubernetes_validate')
  jsonschema = pytest.importorskip('jsonschema')
  if item['kind'] == 'JobSet':
    jsonschema.validate(item, jobset_schema.JOB_SET)
    for job in item['spec']['replicatedJobs']:
      inner = {
        'apiVersion': 'batch/v1',
        'kind': 'Job',
        'metadata': {'name': job['name'], **job['template'].get('metadata', {})},
        'spec': job['template']['spec'],
      }
      kubernetes_validate.validate(inner, version, strict=True)
  else:
    kubernetes_validate.validate(item, version, strict=True)


def jobs(objects):
  """Job specifications by role, those inside the JobSet included."""
  found = {}
  for item in objects.values():
    if item['kind'] == 'Job':
      found[item['metadata']['labels'][kubernetes_pods.ROLE_LABEL]] = item['spec']
    elif item['kind'] == 'JobSet':
      found['learner'] = item['spec']['replicatedJobs'][0]['template']['spec']
  return found


def matches(policy_part, labels):
  wanted = policy_part['podSelector']['matchLabels']
  return all(labels.get(k) == v for k, v in wanted.items())


@pytest.mark.parametrize('version', VERSIONS)
@pytest.mark.parametrize(
  ('learners', 'settings'),
  [
    (1, []),
    (
      4,
      [
        'kubernetes.claim=runs',
        'kubernetes.namespace=lab',
        'kubernetes.pull_secret=registry',
        'kubernetes.node_selector=cloud/pool=gpu,zone=a',
        'kubernetes.setup=. /venv/bin/activate',
        'kubernetes.storage_class=nfs',
      ],
    ),
  ],
)
def test_schemas(version, learners, settings):
  resources = {'learner': program_lib.Resources(8, 65536, 8)}
  program = programs.make(actors=1000, learners=learners, **resources)
  for item in render(program, *settings).values():
    validate(item, version)


@pytest.mark.parametrize(
  'spoil',
  [
    lambda job: job.update(paralelism=3),
    lambda job: job.update(completions='three'),
    lambda job: job['template']['spec'].update(terminationGracePeriodSeconds='soon'),
    lambda job: job['podFailurePolicy']['rules'][0].pop('action'),
    lambda job: job['template']['spec']['containers'][0].update(imag='x'),
  ],
)
def test_the_schemas_refuse(spoil):
  jsonschema = pytest.importorskip('jsonschema')
  for name, item in by_name(programs.make()).items():
    if item['kind'] not in ('Job', 'JobSet'):
      continue
    item = copy.deepcopy(item)
    spoil(next(iter(jobs({name: item}).values())))
    with pytest.raises(jsonschema.ValidationError):
      validate(item, VERSIONS[-1])


@pytest.mark.parametrize(
  'spoil',
  [
    lambda spec: spec.update(successPolcy={}),
    lambda spec: spec['failurePolicy']['rules'][0].update(action='Restart'),
    lambda spec: spec['failurePolicy'].update(maxRestarts=-1),
    lambda spec: spec['replicatedJobs'].clear(),
    lambda spec: spec['network'].update(subdomain='Not_a_label'),
  ],
)
def test_the_schema_of_job_sets_refuses(spoil):
  jsonschema = pytest.importorskip('jsonschema')
  item = by_name(programs.make())['JobSet/impala-catch-1']
  spoil(item['spec'])
  with pytest.raises(jsonschema.ValidationError):
    validate(item, VERSIONS[-1])


def test_objects_of_a_run():
  assert list(by_name(programs.make())) == [
    'PersistentVolumeClaim/impala-catch-1-run',
    'ConfigMap/impala-catch-1-config',
    'NetworkPolicy/impala-catch-1-closed',
    'NetworkPolicy/impala-catch-1-learner',
    'Service/impala-catch-1-learner',
    'JobSet/impala-catch-1',
    'Job/impala-catch-1-actor',
    'Job/impala-catch-1-evaluator',
  ]
  # A volume that is there is used, and left alone by `stop`.
  objects = by_name(programs.make(), 'kubernetes.claim=shared')
  assert not any(n.startswith('PersistentVolumeClaim') for n in objects)
  for job in jobs(objects).values():
    volume = job['template']['spec']['volumes'][0]
    assert volume['persistentVolumeClaim'] == {'claimName': 'shared'}


def test_actors_scale_and_fail_one_by_one():
  job = jobs(by_name(programs.make(actors=1000)))['actor']
  assert job['completions'] == job['parallelism'] == 1000
  assert job['completionMode'] == 'Indexed'
  assert job['backoffLimitPerIndex'] > 0
  # Else a Job could not become smaller.
  assert 'maxFailedIndexes' not in job
  assert 'backoffLimit' not in job
  assert job['podReplacementPolicy'] == 'Failed'
  assert job['podFailurePolicy']['rules'][0]['action'] == 'Ignore'


def test_learners_restart_as_a_unit_and_disruptions_do_not_count():
  objects = by_name(programs.make(learners=4))
  job = jobs(objects)['learner']
  assert job['backoffLimit'] == 0
  assert job['podFailurePolicy']['rules'][0]['action'] == 'FailJob'
  policy = objects['JobSet/impala-catch-1']['spec']['failurePolicy']
  assert policy['rules'][0]['onJobFailureReasons'] == ['PodFailurePolicy']
  assert policy['rules'][0]['action'] == 'RestartJobSetAndIgnoreMaxRestarts'
  assert '--once' in job['template']['spec']['containers'][0]['command']


def test_every_pod_is_bounded_and_unprivileged():
  program = programs.make(learner=program_lib.Resources(4, 8192, 2))
  for role, job in jobs(by_name(program)).items():
    pod = job['template']['spec']
    container = pod['containers'][0]
    assert container['resources']['requests'] == container['resources']['limits']
    assert {'cpu', 'memory'} <= set(container['resources']['limits'])
    gpus = container['resources']['limits'].get('nvidia.com/gpu')
    assert gpus == ('2' if role == 'learner' else None)
    assert pod['securityContext']['runAsNonRoot'] is True
    assert pod['securityContext']['runAsUser'] > 0
    assert container['securityContext']['capabilities'] == {'drop': ['ALL']}
    assert container['securityContext']['allowPrivilegeEscalation'] is False
    assert container['securityContext']['readOnlyRootFilesystem'] is True
    assert pod['automountServiceAccountToken'] is False
    # Kubernetes allows a policy for pod failures with this alone.
    assert pod['restartPolicy'] == 'Never'
    grace = pod['terminationGracePeriodSeconds']
    assert grace > program.role(role).grace
    mounts = {m['name'] for m in container['volumeMounts']}
    assert mounts == {v['name'] for v in pod['volumes']}


def test_only_the_run_reaches_the_learner_and_actors_reach_nothing_else():
  objects = by_name(programs.make(learners=2))
  pods = {
    role: j['template']['metadata']['labels'] for role, j in jobs(objects).items()
  }
  closed = objects['NetworkPolicy/impala-catch-1-closed']['spec']
  opened = objects['NetworkPolicy/impala-catch-1-learner']['spec']
  assert all(matches(closed, labels) for labels in pods.values())
  assert closed['policyTypes'] == ['Ingress', 'Egress']
  assert closed['ingress'] == []
  assert [r for r, labels in pods.items() if matches(opened, labels)] == ['learner']
  ports = {
    p['name']: p['port']
    for p in objects['Service/impala-catch-1-learner']['spec']['ports']
  }
  served = {ports['control'], ports['queue']}
  by_run, by_gang = opened['ingress']
  assert {p['port'] for p in by_run['ports']} == served
  assert all(matches(by_run['from'][0], labels) for labels in pods.values())
  stranger = {'app.kubernetes.io/name': 'impala-jax', 'impala-jax/run': 'other'}
  assert not matches(by_run['from'][0], stranger)
  assert not matches(by_gang['from'][0], pods['actor'])
  names, learner = closed['egress']
  assert {p['port'] for p in names['ports']} == {53}
  assert {p['port'] for p in learner['ports']} == served
  assert not matches(learner['to'][0], pods['actor'])


@pytest.mark.parametrize('version', VERSIONS)
def test_schemas_with_inference_servers(version):
  gpu = program_lib.Resources(4, 8192, 1)
  program = programs.make(actors=100, servers=3, inference=gpu, actor=gpu)
  for item in render(program, 'kubernetes.node_selector=cloud/pool=gpu').values():
    validate(item, version)


def test_only_actors_reach_the_inference_servers():
  objects = by_name(programs.make(learners=2, servers=2))
  pods = {
    role: j['template']['metadata']['labels'] for role, j in jobs(objects).items()
  }
  closed = objects['NetworkPolicy/impala-catch-1-closed']['spec']
  opened = objects['NetworkPolicy/impala-catch-1-inference']['spec']
  assert [r for r, labels in pods.items() if matches(opened, labels)] == ['inference']
  assert matches(closed, pods['inference'])
  (rule,) = opened['ingress']
  reaching = [r for r, labels in pods.items() if matches(rule['from'][0], labels)]
  assert reaching == ['actor']
  service = objects['Service/impala-catch-1-inference']['spec']
  (port,) = (p['port'] for p in service['ports'])
  learner = objects['Service/impala-catch-1-learner']['spec']
  assert port not in {p['port'] for p in learner['ports']}
  assert [p['port'] for p in rule['ports']] == [port]
  # It reaches the learners, and actors reach both.
  _, to_learner, to_server = closed['egress']
  assert matches(to_learner['to'][0], pods['learner'])
  assert matches(to_server['to'][0], pods['inference'])
  assert [p['port'] for p in to_server['ports']] == [port]


def test_inference_servers_are_found_by_name():
  program = programs.make(servers=2, inference=program_lib.Resources(4, 8192, 1))
  objects = by_name(program, 'kubernetes.node_selector=cloud/pool=gpu')
  service = objects['Service/impala-catch-1-inference']['spec']
  job = jobs(objects)['inference']
  pod = job['template']['spec']
  assert service['selector'].items() <= job['template']['metadata']['labels'].items()
  # An Indexed Job names its pods' hosts <job>-<index>, in this domain.
  assert pod['subdomain'] == 'impala-catch-1-inference'
  (container,) = pod['containers']
  env = {e['name']: e.get('value') for e in container['env']}
  host = 'impala-catch-1-inference-$(IMPALA_INDEX).impala-catch-1-inference'
  assert env['IMPALA_HOST'] == host
  assert env['IMPALA_INFERENCE_PORT'] == str(container['ports'][0]['containerPort'])
  assert 'IMPALA_QUEUE_PORT' not in env
  assert pod['nodeSelector'] == {'cloud/pool': 'gpu'}
  assert container['resources']['limits']['nvidia.com/gpu'] == '1'
  assert 'subdomain' not in jobs(objects)['actor']['template']['spec']


def test_learners_are_found_by_name():
  objects = by_name(programs.make(learners=4))
  service = objects['Service/impala-catch-1-learner']['spec']
  assert service['clusterIP'] == 'None'
  assert objects['JobSet/impala-catch-1']['spec']['network']['subdomain'] == (
    'impala-catch-1-learner'
  )
  job = jobs(objects)['learner']
  container = job['template']['spec']['containers'][0]
  assert service['selector'].items() <= job['template']['metadata']['labels'].items()
  env = {e['name']: e.get('value') for e in container['env']}
  host = 'impala-catch-1-learner-0-$(IMPALA_INDEX).impala-catch-1-learner'
  assert env['IMPALA_HOST'] == host
  # A variable must stand after those that it uses.
  assert list(env).index('IMPALA_INDEX') < list(env).index('IMPALA_HOST')
  assert env['IMPALA_COUNT'] == '4'
  ports = {p['name']: p['containerPort'] for p in container['ports']}
  assert env['IMPALA_QUEUE_PORT'] == str(ports['queue'])


@pytest.mark.parametrize('length', [1, 30, 100])
def test_names_fit_where_kubernetes_puts_them(length):
  name = run_name.make(pathlib.Path('/runs', 'x' * length), 'abcdefghij')
  program = dataclasses.replace(programs.make(actors=100_000), name=name)
  for item in by_name(program).values():
    name = item['metadata']['name']
    assert re.fullmatch(r'[a-z0-9]([-a-z0-9]*[a-z0-9])?', name)
    # Pods of a Job end in -<index>-<five letters>, those of a JobSet in -0-<index>.
    assert len(f'{name}-99999-abcde') <= 63
    for value in item['metadata']['labels'].values():
      assert len(value) <= 63


def test_the_role_commands_are_those_of_every_backend():
  for role, job in jobs(by_name(programs.make())).items():
    command = job['template']['spec']['containers'][0]['command']
    assert command[:4] == ['python', '-m', 'impala_jax.launching.supervise', role]
    tail = ['--', 'python', '-m', 'impala_jax.distributed.roles.run', role]
    assert command[-5:] == tail
  setup = '. /venv/bin/activate'
  for job in jobs(by_name(programs.make(), f'kubernetes.setup={setup}')).values():
    command = job['template']['spec']['containers'][0]['command']
    assert command[:2] == ['/bin/sh', '-c']
    # Kubernetes makes one of two.
    lines = command[2].replace('$$', '$').splitlines()
    assert lines == [f"eval '{setup}'", 'exec "$@"']


def test_what_the_engine_cannot_hold_is_refused():
  with pytest.raises(backend.BackendError, match='100001 of actor'):
    render(programs.make(actors=100_001))


@pytest.mark.parametrize(
  ('setting', 'words'),
  [
    ('user=0', 'kubernetes.user is 0'),
    ('base_port=80', 'kubernetes.base_port is 80'),
    ('namespace=My_Lab', "kubernetes.namespace is 'My_Lab'"),
    ('node_selector=gpu', 'must be key=value'),
    ('imag=x', 'did you mean kubernetes.image'),
  ],
)
def test_mistakes_in_options(setting, words):
  with pytest.raises(config_lib.ConfigError, match=re.escape(words)):
    backends.get('kubernetes', [f'kubernetes.{setting}'])
