"""What a submission to Kubernetes that fails takes back: what it did, and no more."""

import contextlib
import json
import os
import pathlib
import re
import stat
import sys

import pytest

from impala_jax.launching import backends, run_name
from impala_jax.launching.backends import backend
from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory
from tests.launching import kubectl, programs

_CLAIM = 'PersistentVolumeClaim'


class Cluster:
  def __init__(self, folder, monkeypatch):
    self._folder = folder / 'cluster'
    self._environment = monkeypatch
    bin_folder = folder / 'bin'
    bin_folder.mkdir()
    script = bin_folder / 'kubectl'
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {kubectl.__file__} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    path = f'{bin_folder}{os.pathsep}{os.environ["PATH"]}'
    monkeypatch.setenv('PATH', path)
    monkeypatch.setenv('CLUSTER', str(self._folder))

  def objects(self):
    """Their texts by kind and name."""
    found = self._folder.rglob('* *')
    return {p.name.replace(' ', '/'): p.read_text() for p in found}

  def kinds(self):
    return {name.partition('/')[0] for name in self.objects()}

  @contextlib.contextmanager
  def refusing(self, what):
    with self._environment.context() as environment:
      environment.setenv('REFUSED', what)
      yield

  def says_nothing(self):
    self._environment.setenv('SILENT', '1')


@pytest.fixture(params=['kubectl speaks', 'kubectl is silent'])
def cluster(tmp_path, monkeypatch, request):
  cluster = Cluster(tmp_path, monkeypatch)
  if request.param == 'kubectl is silent':
    cluster.says_nothing()
  return cluster


def submit(run_dir, *settings, actors=3, launches=0):
  run_dir.mkdir(parents=True, exist_ok=True)
  engine = backends.get('kubernetes', settings)
  name = run_name.ensure(run_dir)
  program = programs.make(
    str(run_dir), actors, launches=launches, name=name, **engine.options.resources
  )
  return engine.submit(program)


@pytest.mark.parametrize('kind', ['ConfigMap', 'NetworkPolicy', 'JobSet', 'Job'])
def test_a_first_one_leaves_the_claim_alone(cluster, tmp_path, kind):
  with (
    cluster.refusing(f'apply {kind}'),
    pytest.raises(backend.BackendError, match=f'webhook.*left as they are {_CLAIM}/'),
  ):
    submit(tmp_path / 'run')
  assert cluster.kinds() == {_CLAIM}
  assert not RunDirectory(tmp_path / 'run').launch.exists()
  submit(tmp_path / 'run')
  assert 'JobSet' in cluster.kinds()


@pytest.mark.parametrize('kind', ['NetworkPolicy', 'JobSet', 'Job'])
def test_a_running_one_goes_on_as_it_was(cluster, tmp_path, kind):
  launch = submit(tmp_path / 'run')
  backends.of_launch(launch).scale(launch, 'actor', 5)
  before = cluster.objects()
  with (
    cluster.refusing(f'apply {kind}'),
    pytest.raises(backend.BackendError, match='webhook'),
  ):
    # Another ConfigMap, and another number.
    submit(tmp_path / 'run', actors=7)
  assert cluster.objects() == before
  assert backend.read_launch(launch.run_dir).program.role('actor').replicas == 5


def test_what_cannot_be_changed_is_left_as_it_is(cluster, tmp_path):
  launch = submit(tmp_path / 'run')
  before, told = cluster.objects(), launch.run.launch.read_text()
  with pytest.raises(backend.BackendError, match=r'immutable.*changed back'):
    submit(tmp_path / 'run', 'kubernetes.actor_memory_gib=6', launches=1)
  assert cluster.objects() == before
  assert launch.run.launch.read_text() == told


@pytest.mark.parametrize('kind', ['ConfigMap', 'JobSet', 'Job'])
def test_a_stopped_one_keeps_its_volume(cluster, tmp_path, kind):
  launch = submit(tmp_path / 'run')
  claim = {n: t for n, t in cluster.objects().items() if n.startswith(_CLAIM)}
  assert 'kept' in backends.of_launch(launch).stop(launch)
  assert cluster.objects() == claim
  with (
    cluster.refusing(f'apply {kind}'),
    pytest.raises(backend.BackendError, match='webhook'),
  ):
    submit(tmp_path / 'run', launches=1)
  assert cluster.objects() == claim
  submit(tmp_path / 'run', launches=1)
  assert claim.items() <= cluster.objects().items()
  # Stopped twice is stopped.
  for _ in range(2):
    launch = backend.read_launch(tmp_path / 'run')
    backends.of_launch(launch).stop(launch)
  assert cluster.objects() == claim


def test_a_scale_that_fails_changes_nothing(cluster, tmp_path, monkeypatch):
  launch = submit(tmp_path / 'run')
  engine = backends.of_launch(launch)
  before, told = cluster.objects(), launch.run.launch.read_text()
  with (
    cluster.refusing('patch job'),
    pytest.raises(backend.BackendError, match='not now'),
  ):
    engine.scale(launch, 'actor', 5)
  assert (cluster.objects(), launch.run.launch.read_text()) == (before, told)

  def write_json(path, data):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(files, 'write_json', write_json)
  with pytest.raises(backend.BackendError, match=r'launch\.json: No space'):
    engine.scale(launch, 'actor', 5)
  assert (cluster.objects(), launch.run.launch.read_text()) == (before, told)
  assert launch.program.role('actor').replicas == 3


def test_what_will_not_go_is_named(cluster, tmp_path):
  with cluster.refusing('apply JobSet'), pytest.MonkeyPatch.context() as patch:
    run = backend.run_command

    def run_command(argv, *args, **kwargs):
      if 'delete' in argv:
        raise backend.BackendError('no')
      return run(argv, *args, **kwargs)

    patch.setattr(backend, 'run_command', run_command)
    with pytest.raises(backend.BackendError, match=r'left as they are .*ConfigMap/'):
      submit(tmp_path / 'run')


def test_runs_never_touch_each_other(cluster, tmp_path):
  folders = ['seed' * 20 + '1', 'seed' * 20 + '2', 'a/run', 'b/run', '实验', '試す']
  seen = {}
  for folder in folders:
    submit(tmp_path / folder)
    objects = cluster.objects()
    assert seen.items() <= objects.items()
    assert len(objects) == len(seen) + 8
    seen = objects
  text = json.dumps(sorted(seen.values()))
  # Nor in one volume.
  found = re.findall(r'\\"subPath\\": \\"(impala-[^"\\]+)', text)
  assert len(set(found)) == len(folders)
  with cluster.refusing('apply Job'), pytest.raises(backend.BackendError):
    submit(tmp_path / 'c/run')
  left = cluster.objects()
  assert seen.items() <= left.items()
  assert {n.partition('/')[0] for n in left.keys() - seen.keys()} == {_CLAIM}


def test_objects_of_another_run_are_left_alone(cluster, tmp_path):
  submit(tmp_path / 'run')
  name = run_name.read(tmp_path / 'run')
  cluster_folder = pathlib.Path(os.environ['CLUSTER'], 'default')
  for owner in ('impala-other', None):
    path = cluster_folder / f'ConfigMap {name}-config'
    item = json.loads(path.read_text())
    item['metadata']['labels'] = {'impala-jax/run': owner} if owner else {}
    path.write_text(json.dumps(item))
    before = cluster.objects()
    words = rf'ConfigMap/{name}-config .* belongs to {owner or "somebody else"}'
    with pytest.raises(backend.BackendError, match=words):
      submit(tmp_path / 'run', launches=1)
    assert cluster.objects() == before


def test_a_run_goes_on_with_its_own_volume_or_not_at_all(cluster, tmp_path):
  run_dir = tmp_path / 'run'
  launch = submit(run_dir)
  backends.of_launch(launch).stop(launch)
  for settings in (['kubernetes.namespace=lab'], ['kubernetes.claim=team']):
    with pytest.raises(backend.BackendError, match='checkpoints are in the volume of'):
      submit(run_dir, *settings, launches=1)
  # From before runs had names of their own.
  RunDirectory(run_dir).run_name.unlink()
  before = cluster.objects()
  with pytest.raises(backend.BackendError, match=launch.program.name) as e:
    submit(run_dir, launches=1)
  assert cluster.objects() == before
  # The line says how to go on.
  told = re.search(r'(\{.*?\}) in (\S+) ', str(e.value))
  pathlib.Path(told[2]).write_text(told[1])
  submit(run_dir, launches=1)
  assert before.items() <= cluster.objects().items()
