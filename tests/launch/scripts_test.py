"""The scripts as they are typed: by path from any folder, and as modules."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted(p for p in (ROOT / 'launch').glob('*.py') if p.stem != '__init__')


@pytest.fixture
def elsewhere(tmp_path):
  """A folder with packages of its own that have the names of ours."""
  for name in ('launch', 'experiments'):
    (tmp_path / name).mkdir()
    (tmp_path / name / '__init__.py').write_text(f'raise ImportError("{name} of mine")')
  return tmp_path


def run(command, folder, timeout=60):
  """As a shell would whose `python3` is this one; the package is not installed."""
  left_out = ('PYTHONPATH', 'XLA_FLAGS')
  environment = {k: v for k, v in os.environ.items() if k not in left_out}
  path = f'{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
  return subprocess.run(
    list(map(str, command)),
    cwd=folder,
    env={**environment, 'PATH': path},
    capture_output=True,
    text=True,
    timeout=timeout,
  )


def test_the_scripts_that_there_are():
  names = {path.stem for path in SCRIPTS}
  assert names == {'evaluate', 'fill_level_cache', 'manage', 'run_atari', 'run_dmlab30'}


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.stem)
def test_by_path_from_another_folder(script, elsewhere):
  assert script.stat().st_mode & 0o777 == 0o755
  done = run([script, '--help'], elsewhere)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith(f'usage: {script} ')
  assert 'Default: ' in done.stdout


def test_by_relative_path(elsewhere):
  script = os.path.relpath(ROOT / 'launch' / 'manage.py', elsewhere)
  done = run([script, 'status', 'nowhere'], elsewhere)
  assert (done.returncode, done.stdout) == (1, '')
  assert 'no launched run in' in done.stderr


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.stem)
def test_as_a_module(script):
  module = f'launch.{script.stem}'
  done = run([sys.executable, '-m', module, '--help'], ROOT)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith(f'usage: python -m {module} ')


def test_the_command_of_the_mission(elsewhere):
  """Without a launcher of the site, on a machine that does not hold it."""
  script = ROOT / 'launch' / 'run_dmlab30.py'
  done = run([script, '--num_actors', '1000'], elsewhere)
  assert done.returncode == 2
  assert '1,000 actors are more than this machine holds' in done.stderr
  assert f'{script} --num_actors 1000 --launcher=slurm --dry_run' in done.stderr
  assert 'Traceback' not in done.stderr
  assert {p.name for p in elsewhere.iterdir()} == {'launch', 'experiments'}


def test_a_run_from_another_folder(elsewhere):
  """Its processes find the package, and a suite of the user's own, too."""
  (elsewhere / 'my_suite.py').write_text(
    'from impala_jax.environments import catch\n'
    'def make(level, seed):\n'
    '  return catch.Catch(seed=seed)\n'
  )
  script = ROOT / 'launch' / 'run_atari.py'
  done = run(
    [
      script,
      '--config=catch',
      '--transport=local',
      '--total_frames=2000',
      '--view=plain',
      '--run_dir=runs/mine',
      '--set=environment.suite=my_suite:make',
      '--set=environment.levels=mine',
    ],
    elsewhere,
    240,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  records = (elsewhere / 'runs' / 'mine' / 'metrics.jsonl').read_text().splitlines()
  assert json.loads(records[-1])['frames'] >= 2000


@pytest.mark.parametrize('as_module', [False, True])
def test_it_says_what_to_type_next(tmp_path, as_module):
  """What it names as the next command is one that works there."""
  name = 'launch.run_atari' if as_module else ROOT / 'launch' / 'run_atari.py'
  command = [sys.executable, '-m', name] if as_module else [name]
  done = run([*command, '--num_actors=1000'], ROOT)
  (line,) = [x for x in done.stderr.splitlines() if x.startswith('on a cluster: ')]
  typed = line.removeprefix('on a cluster: ').split()
  assert typed[-3:] == ['--num_actors=1000', '--launcher=slurm', '--dry_run']
  assert typed[:-3] == (['python', '-m', name] if as_module else [str(name)])
