"""What is submitted to Slurm, whatever this shell has for defaults of its commands, and
what is taken back where that fails. With stand-ins for them.
"""

import os

import pytest

from impala_jax.launching import backends
from impala_jax.launching.backends import backend
from impala_jax.runtime import files
from tests.launching import programs

# Numbers jobs from 1 on, refuses those whose script $REFUSED names, and says so twice.
_SBATCH = """#!/bin/sh
case "$2" in *"${REFUSED:-no such script}"*) echo 'sbatch: no' >&2; exit 1;; esac
echo "$2" >> $SLURM/submitted
env | grep -E "^S(BATCH|LURM)_" | sort > "$SLURM/$(basename "$2").variables"
wc -l < $SLURM/submitted
"""
_SCANCEL = """#!/bin/sh
echo "$@" >> $SLURM/cancelled
[ -z "$KEPT" ] || { echo 'scancel: no' >&2; exit 1; }
"""


class Slurm:
  def __init__(self, folder, monkeypatch):
    self._folder, self._monkeypatch = folder, monkeypatch
    for name, text in (('sbatch', _SBATCH), ('scancel', _SCANCEL)):
      (folder / name).write_text(text)
      (folder / name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder}{os.pathsep}{os.environ["PATH"]}')
    monkeypatch.setenv('SLURM', str(folder))

  def refuse(self, script):
    self._monkeypatch.setenv('REFUSED', script)

  def keep_all(self):
    self._monkeypatch.setenv('KEPT', '1')

  def told(self, script):
    """Variables with sbatch's defaults that it had."""
    text = (self._folder / f'{script}.variables').read_text()
    return dict(line.split('=') for line in text.splitlines())

  @property
  def cancelled(self):
    path = self._folder / 'cancelled'
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def slurm(tmp_path, monkeypatch):
  folder = tmp_path / 'slurm'
  folder.mkdir()
  return Slurm(folder, monkeypatch)


def submit(tmp_path, actors=5):
  engine = backends.get('slurm', ['slurm.max_array_size=2'])
  return engine.submit(programs.make(str(tmp_path / 'run'), actors))


def test_a_refused_job_takes_those_of_this_call_with_it(slurm, tmp_path):
  launch = submit(tmp_path)
  told = launch.run.launch.read_text()
  slurm.refuse('evaluator.sbatch')
  with pytest.raises(backend.BackendError, match='sbatch: no'):
    submit(tmp_path)
  # Jobs 1 to 5 are those of the first call.
  assert slurm.cancelled == ['6 7 8 9']
  assert launch.run.launch.read_text() == told


def test_what_cannot_be_cancelled_is_named(slurm, tmp_path):
  slurm.refuse('evaluator.sbatch')
  slurm.keep_all()
  words = 'sbatch: no; still there are the jobs 1, 2, 3, 4: .*scancel: no'
  with pytest.raises(backend.BackendError, match=words):
    submit(tmp_path)


def test_nothing_is_cancelled_where_nothing_was_submitted(slurm, tmp_path):
  slurm.refuse('learner.sbatch')
  with pytest.raises(backend.BackendError, match='sbatch: no'):
    submit(tmp_path)
  assert slurm.cancelled == []


def test_a_launch_that_cannot_be_noted_is_cancelled(slurm, tmp_path, monkeypatch):
  def write_json(path, data):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(files, 'write_json', write_json)
  with pytest.raises(backend.BackendError, match=r'launch\.json: No space'):
    submit(tmp_path)
  assert slurm.cancelled == ['1 2 3 4 5']


def test_actors_that_cannot_be_added_leave_those_that_are_there(slurm, tmp_path):
  launch = submit(tmp_path, actors=2)
  told = launch.run.launch.read_text()
  engine = backends.of_launch(launch)
  slurm.refuse('actor-000004')  # The second of two arrays.
  with pytest.raises(backend.BackendError, match='sbatch: no'):
    engine.scale(launch, 'actor', 6)
  assert slurm.cancelled == ['4']
  assert launch.run.launch.read_text() == told
  slurm.refuse('nothing')
  assert engine.scale(backend.read_launch(launch.run_dir), 'actor', 6)
  handles = backend.read_launch(launch.run_dir).handles['actor']
  assert [(h['first'], h['count']) for h in handles] == [(0, 2), (2, 2), (4, 2)]


def test_scripts_win_over_the_shell_and_sites_choose_the_rest(
  slurm, tmp_path, monkeypatch
):
  for name in (
    'JOB_NAME',
    'ARRAY_INX',
    'WAIT',
    'SIGNAL',
    'PARTITION',
    'ACCOUNT',
    'QOS',
  ):
    monkeypatch.setenv(f'SBATCH_{name}', 'mine')
  # A shell within another job, whose srun would not go with ours.
  for name in ('JOB_ID', 'MEM_PER_CPU', 'CONF'):
    monkeypatch.setenv(f'SLURM_{name}', 'mine')
  settings = ['max_array_size=2', 'learner_partition=gpu', 'extra=--qos=low']
  engine = backends.get('slurm', [f'slurm.{s}' for s in settings])
  engine.submit(programs.make(str(tmp_path / 'run'), 2))
  chosen = {'SBATCH_ACCOUNT': 'mine', 'SLURM_CONF': 'mine'}
  assert slurm.told('learner.sbatch') == chosen
  assert slurm.told('actor-000000.sbatch') == chosen | {'SBATCH_PARTITION': 'mine'}
