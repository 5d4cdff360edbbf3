"""The wheel: what is in it, and that what is in it is enough."""

import configparser
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """Built of a copy, so that nothing is left in the source tree."""
  source = tmp_path_factory.mktemp('source') / 'tree'
  source.mkdir()
  for name in ('setup.py', 'pyproject.toml', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  for name in ('impala_jax', 'launch', 'experiments', 'tests'):
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, source / name, ignore=ignored)
  folder = source.parent / 'wheel'
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'pip',
      'wheel',
      '--quiet',
      '--no-build-isolation',
      '--no-deps',
      '--no-index',
      f'--wheel-dir={folder}',
      source,
    ],
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert done.returncode == 0, done.stderr
  (path,) = folder.iterdir()
  return path


@pytest.fixture
def installed(wheel, tmp_path):
  """A folder with what the wheel holds, and nothing else of ours."""
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(tmp_path / 'site')
  return tmp_path / 'site'


def test_it_holds_the_package_alone(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  tops = {name.split('/')[0] for name in names}
  assert {top for top in tops if not top.endswith('.dist-info')} == {'impala_jax'}
  # As the source tree has it: every module, and what is no module.
  here = [p for p in (ROOT / 'impala_jax').rglob('*') if '__pycache__' not in p.parts]
  files = {str(p.relative_to(ROOT)) for p in here if p.is_file()}
  assert 'impala_jax/py.typed' in files
  assert 'impala_jax/onednn/calls.c' in files
  compiled = {name for name in names if name.endswith('.so')}
  assert names - compiled - {n for n in names if '.dist-info/' in n} == files
  assert len(compiled) == (shutil.which('cc') is not None)


def test_it_brings_the_console_command(installed):
  entry_points = configparser.ConfigParser()
  (path,) = installed.glob('*.dist-info/entry_points.txt')
  entry_points.read(path)
  scripts = dict(entry_points['console_scripts'])
  assert scripts == {'impala': 'impala_jax.commands.main:main'}


def test_it_works_among_packages_of_the_same_names(installed, tmp_path):
  """It needs neither `launch` nor `experiments`, of which the user has their own."""
  place = tmp_path / 'place'
  for name in ('launch', 'experiments'):
    (place / name).mkdir(parents=True)
    (place / name / '__init__.py').write_text(f'raise ImportError("{name} of mine")')
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  # As pip would write it, and as it would be called.
  impala = tmp_path / 'impala'
  impala.write_text(
    'import sys\nfrom impala_jax.commands.main import main\nsys.exit(main())\n'
  )
  done = subprocess.run(
    [
      sys.executable,
      impala,
      'train',
      '--config=catch',
      '--transport=local',
      '--seed=5',
      '--check',
    ],
    env={**environment, 'PYTHONPATH': str(installed)},
    cwd=place,
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert json.JSONDecoder().raw_decode(done.stdout)[0]['seed'] == 5
