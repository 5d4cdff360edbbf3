"""setup.py, the two pinned sets and this environment agree with the code."""

import importlib.metadata
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
from packaging import requirements as pr
from packaging import utils

from tests import imports_test

ROOT = pathlib.Path(__file__).parents[1]
SETS = ('cluster', 'latest')
EXTRAS = {
  'all',
  'atari',
  'cuda12',
  'cuda13',
  'dev',
  'dmlab',
  'doom',
  'gymnasium',
  'notebooks',
  'onednn',
  'plots',
  'reverb',
  'tls',
  'tpu',
  'video',
}
NOT_IN_ALL = {'all', 'cuda12', 'cuda13', 'reverb', 'tpu'}
# Where the name of the import is not that of the distribution.
DISTRIBUTIONS = {
  'PIL': 'pillow',
  'absl': 'absl-py',
  'ale_py': 'ale-py',
  'google': 'protobuf',
  'grpc': 'grpcio',
  'reverb': 'dm-reverb',
  'tensorflow': 'tensorflow-cpu',
  'tree': 'dm-tree',
  'yaml': 'pyyaml',
}
UV = pathlib.Path(sys.prefix).parent / 'uv'  # The environment that tools/ made of it.
NOT_PACKAGED = {
  'deepmind_lab',  # Built from sources; see the extra `dmlab` of setup.py.
  'procgen',  # Asks for packages too old for the rest; see environments/procgen.py.
  'torch',  # What a benchmark compares with, run by a Python of its own.
}


HERE = '.'.join(platform.python_version_tuple()[:2])
# Each set, for each Python that it is pinned for.
PINNED = [('cluster', '3.11'), *(('latest', f'3.{minor}') for minor in (11, 12, 13))]


def lines_of(name):
  lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
  return [line for line in lines if not line.startswith('#')]


def pins(name, python='3.11'):
  """Versions by package, of those that a set has on Linux for one Python."""
  place = {
    'python_version': python,
    'python_full_version': f'{python}.0',
    'sys_platform': 'linux',
    'platform_python_implementation': 'CPython',
  }
  found = [pr.Requirement(line) for line in lines_of(name)]
  wanted = [r for r in found if r.marker is None or r.marker.evaluate(place)]
  versions = {
    utils.canonicalize_name(r.name): str(r.specifier).removeprefix('==') for r in wanted
  }
  assert len(versions) == len(wanted)
  return versions


@pytest.fixture(scope='session')
def metadata(tmp_path_factory):
  """The metadata that a build from setup.py and pyproject.toml gives."""
  source = tmp_path_factory.mktemp('source')
  for name in ('setup.py', 'pyproject.toml'):
    shutil.copy(ROOT / name, source)
  for folder in imports_test.OURS:
    (source / folder / 'inner').mkdir(parents=True)
    (source / folder / 'inner' / 'module.py').touch()
    (source / folder / '__init__.py').touch()
    (source / folder / 'inner' / '__init__.py').touch()
  script = (
    'from setuptools import build_meta; '
    'print(build_meta.prepare_metadata_for_build_wheel("."))'
  )
  result = subprocess.run(
    [sys.executable, '-c', script],
    cwd=source,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert result.returncode == 0, result.stderr
  built = source / result.stdout.splitlines()[-1]
  return importlib.metadata.PathDistribution(built)


def declared(metadata, extra=''):
  """Requirements of the package, or those that `extra` adds, markers apart."""
  found = []
  for line in metadata.requires:
    requirement = pr.Requirement(line)
    marker = str(requirement.marker or '')
    match = re.search(r'extra == "(.*?)"', marker)
    if (match.group(1) if match else '') == extra:
      found.append(requirement)
  return found


def test_metadata(metadata):
  assert utils.canonicalize_name(metadata.metadata['Name']) == 'impala-jax'
  assert metadata.metadata['Requires-Python'] == '>=3.11'
  assert set(metadata.metadata.get_all('Provides-Extra')) == EXTRAS
  assert (metadata.read_text('top_level.txt') or '').split() == ['impala_jax']


def test_all_holds_every_extra_that_pip_can_install(metadata):
  both = {r.name for e in EXTRAS - NOT_IN_ALL for r in declared(metadata, e)}
  assert {r.name for r in declared(metadata, 'all')} == both


@pytest.mark.parametrize('extra', ['cuda12', 'cuda13', 'tpu'])
def test_the_extra_of_an_accelerator_is_that_of_jax(metadata, extra):
  (requirement,) = declared(metadata, extra)
  assert (requirement.name, requirement.extras) == ('jax', {extra})


def test_every_import_is_declared(metadata):
  names = {
    utils.canonicalize_name(r.name)
    for extra in ['', *EXTRAS]
    for r in declared(metadata, extra)
  }
  base = {utils.canonicalize_name(r.name) for r in declared(metadata)}
  for path in imports_test.source_files():
    for item in imports_test.read(path):
      top = item.module.split('.')[0]
      if top in sys.stdlib_module_names or top in {*imports_test.OURS, *NOT_PACKAGED}:
        continue
      wanted = utils.canonicalize_name(DISTRIBUTIONS.get(top, top))
      place = f'{path.relative_to(ROOT)}:{item.lineno} imports {top}'
      assert wanted in names, f'{place}: declare {wanted} in setup.py'
      if item.at_top and path.is_relative_to(ROOT / 'impala_jax'):
        assert wanted in base, f'{place} at the top, but {wanted} is an extra'


@pytest.mark.parametrize('name', SETS)
def test_pins_are_plain_and_sorted(name):
  lines = lines_of(name)
  assert len(lines) > 50
  pin = r'[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.+!]*'
  marker = r"""[a-z_]+ (<|>=|==|!=) '[A-Za-z0-9.]+'"""
  for line in lines:
    # What was resolved for one Python alone has no markers.
    form = pin if name == 'cluster' else f'{pin}( ; {marker}( and {marker})*)?'
    assert re.fullmatch(form, line), line
  names = [line.split('==')[0].lower() for line in lines]
  assert names == sorted(names)


@pytest.mark.parametrize(('name', 'python'), PINNED)
def test_pins_are_what_setup_py_allows(metadata, name, python):
  extras = ['', 'atari', 'dev', 'doom', 'gymnasium', 'plots', 'tls', 'video']
  if name == 'cluster':
    extras.append('reverb')
  pinned = pins(name, python)
  for extra in extras:
    for requirement in declared(metadata, extra):
      version = pinned[utils.canonicalize_name(requirement.name)]
      assert requirement.specifier.contains(version), (requirement, version)


def test_the_pin_of_onednn_is_what_setup_py_allows(metadata):
  (requirement,) = declared(metadata, 'onednn')
  (version,) = pins('onednn').values()
  assert list(pins('onednn')) == [requirement.name]
  assert requirement.specifier.contains(version)


def test_the_set_of_reverb_is_within_the_constraints():
  pinned = pins('cluster')
  for line in (ROOT / 'requirements' / 'constraints.txt').read_text().splitlines():
    if not line.startswith('#'):
      limit = pr.Requirement(line)
      version = pinned[utils.canonicalize_name(limit.name)]
      assert limit.specifier.contains(version), (line, version)


@pytest.mark.skipif(
  pathlib.Path(sys.prefix).name != 'cluster', reason='of the cluster set'
)
@pytest.mark.skipif(not UV.exists(), reason='this environment was not made by uv')
def test_companions_resolve_and_leave_the_set_as_it_is():
  companions = ['pandas', 'jupyterlab', 'wandb']
  command = [UV / 'bin' / 'uv', 'pip', 'install', '--dry-run']
  command += ['--python', sys.executable, '-c', 'requirements/constraints.txt']
  result = subprocess.run(
    command + companions, cwd=ROOT, capture_output=True, text=True, timeout=250
  )
  if 'client error (Connect)' in result.stderr:
    pytest.skip('the package index cannot be reached')
  assert result.returncode == 0, result.stderr
  changes = re.findall(r'^ ([-+~]) (\S+)==', result.stderr, re.MULTILINE)
  added = {name for sign, name in changes if sign == '+'}
  assert {sign for sign, _ in changes} == {'+'}, result.stderr
  assert {*companions} <= added
  assert not added & set(pins('cluster'))


def test_latest_is_free_of_tensorflow():
  for name, python in PINNED[1:]:
    found = set(pins(name, python))
    assert not {'dm-reverb', 'tensorflow', 'tensorflow-cpu', 'keras'} & found


@pytest.mark.skipif(
  pathlib.Path(sys.prefix).name not in SETS, reason='not a pinned environment'
)
def test_this_environment_is_the_pinned_one():
  present = {
    utils.canonicalize_name(d.metadata['Name']): d.version
    # By path: setuptools adds its vendored copies to sys.path when it is imported.
    for d in importlib.metadata.distributions(path=[sysconfig.get_path('purelib')])
  }
  wanted = pins(pathlib.Path(sys.prefix).name, HERE)
  different = {
    name: (version, present.get(name))
    for name, version in wanted.items()
    if present.get(name) != version
  }
  assert not different, f'(pinned, installed): {different}; run: make setup'


@pytest.mark.skipif(
  pathlib.Path(sys.prefix).name not in SETS, reason='not a pinned environment'
)
def test_dependencies_agree_save_for_the_known_clash():
  result = subprocess.run(
    [sys.executable, '-m', 'pip', 'check'], capture_output=True, text=True, timeout=120
  )
  lines = result.stdout.splitlines()
  unknown = [
    line
    for line in lines
    if not re.match(r'tensorflow-cpu 2\.15\.1 .*ml-dtypes', line)
    and line != 'No broken requirements found.'
  ]
  assert not unknown
  assert (result.returncode != 0) == (pathlib.Path(sys.prefix).name == 'cluster')
