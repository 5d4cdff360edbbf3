"""A run directory has one owner, whoever asks for it, and the newest is the one."""

import concurrent.futures
import dataclasses
import os
import subprocess
import sys

import pytest

from impala_jax.runtime import files, lease
from impala_jax.runtime.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path):
  return RunDirectory(tmp_path / 'run')


def test_of_many_that_ask_at_once_one_becomes_the_owner(run):
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    made = list(pool.map(lambda i: lease.make(run, 3, f'launcher {i}'), range(64)))
  assert made.count(True) == 1
  owner = lease.newest(run)
  assert (owner.launch, owner.launcher) == (3, f'launcher {made.index(True)}')
  assert owner.here
  assert owner.pid == os.getpid()


def test_processes_are_told_apart(run):
  script = (
    'import pathlib, sys; from impala_jax.runtime import lease, run_directory; '
    'run = run_directory.RunDirectory(pathlib.Path(sys.argv[1])); '
    'print(lease.make(run, 0, "child"))'
  )
  command = [sys.executable, '-c', script, str(run.path)]
  children = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
  answers = sorted(child.communicate()[0].strip() for child in children)
  assert answers == [b'False', b'True']
  assert lease.newest(run).pid in [child.pid for child in children]


def test_a_heart_beats_and_tells_where_it_is(run, monkeypatch):
  monkeypatch.setattr(lease, 'BEAT', 0.01)
  lease.make(run, 0, 'local')
  submitted = lease.newest(run)
  files.write_json(
    run.owner(0), {**dataclasses.asdict(submitted), 'place': 'elsewhere', 'pid': 1}
  )
  before = lease.newest(run)
  assert not before.here
  assert not lease.beats(run, before, 0.05)
  with lease.Heart(run, 0):
    now = lease.newest(run)
    assert (now.pid, now.here, now.launcher) == (os.getpid(), True, 'local')
    assert now.since == submitted.since
    assert lease.beats(run, now, 60.0)
  last = lease.newest(run)
  assert not lease.beats(run, last, 0.05)
  assert not last.released  # Others of its launch may still run.
  lease.release(run, 0)
  assert lease.newest(run).released


def test_an_owner_that_was_thought_dead_does_not_come_back(run, monkeypatch):
  monkeypatch.setattr(lease, 'BEAT', 0.01)
  lease.make(run, 4, 'slurm')
  with lease.Heart(run, 4):
    assert not lease.superseded(run, 4)
    lease.check(run, 'learner', 0, 4002)
    assert lease.make(run, 5, 'foreground')
    owner = lease.newest(run)
    assert lease.superseded(run, 4)
    with pytest.raises(lease.LeaseError, match='belongs to a newer launch'):
      lease.check(run, 'learner', 0, 4002)
    assert not lease.beats(run, owner, 0.1)  # The other's beats are not this one's.
  assert lease.newest(run) == owner
  lease.check(run, 'learner', 0, 5000)
  lease.release(run, 4)  # Nor does its end.
  assert not lease.newest(run).released


def test_a_process_that_was_started_again_writes_no_more(run):
  record = run.supervised('learner', 0)
  record.parent.mkdir(parents=True)
  files.write_json(record, {'incarnation': 7})
  lease.check(run, 'learner', 0, 7)
  lease.check(run, 'learner', 1, 0)
  with pytest.raises(lease.LeaseError, match=r'started again \(incarnation 7\)'):
    lease.check(run, 'learner', 0, 6)


def test_a_directory_without_owners_is_nobodys(run):
  assert lease.newest(run) is None
  assert not lease.superseded(run, 0)
  lease.release(run, 0)
  lease.check(run, 'all', 0, 0)
  assert not run.path.exists()


@pytest.mark.parametrize('text', ['', '{"pid": ', '[]', '{"nonsense": 1}'])
def test_a_file_that_is_being_written_has_a_number_at_least(run, text):
  run.owner(2).parent.mkdir(parents=True)
  run.owner(2).write_text(text)
  (run.owner(2).parent / 'notes.json').write_text('')
  owner = lease.newest(run)
  assert (owner.launch, owner.here, owner.released) == (2, False, False)
