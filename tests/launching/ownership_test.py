"""Whether a run still runs: asked of the kernel or its engine, or seen by its beats."""

import dataclasses
import os
import shutil
import subprocess
import sys
import threading

import psutil
import pytest

from impala_jax.launching import program as program_lib
from impala_jax.launching import supervision
from impala_jax.launching.backends import backend, local, ownership
from impala_jax.runtime import files, lease
from impala_jax.runtime.run_directory import RunDirectory
from tests.launching import programs


@pytest.fixture(autouse=True)
def run(tmp_path, monkeypatch):
  monkeypatch.setattr(lease, 'BEAT', 0.02)
  return RunDirectory(tmp_path / 'run')


@pytest.fixture(autouse=True)
def watch(monkeypatch):
  """Sets for how many seconds beats are waited for: not long where there are none."""
  watched = lease.beats

  def watch(seconds):
    monkeypatch.setattr(lease, 'beats', lambda run, owner: watched(run, owner, seconds))

  watch(0.2)
  return watch


@pytest.fixture
def command(tmp_path, monkeypatch):
  """Puts shell scripts that stand in for commands on an otherwise empty PATH."""
  folder = tmp_path / 'bin'
  folder.mkdir()
  monkeypatch.setenv('PATH', str(folder))

  def stand_in(name, script):
    (folder / name).write_text(f'#!/bin/sh\n{script}\n')
    (folder / name).chmod(0o755)

  return stand_in


def own(run, launcher, launch=0, **changes):
  """An owner of whatever kind."""
  assert lease.make(run, launch, launcher)
  owner = {**dataclasses.asdict(lease.read(run, launch)), **changes}
  files.write_json(run.owner(launch), owner)


def submitted(run, launcher, handles, launch=0):
  program = programs.make(str(run.path), launches=launch)
  options = {'python': 'python3'} if launcher == 'slurm' else {}
  run.path.mkdir()
  made = backend.Launch(launcher, options, program, handles)
  made.write()


def claim(run):
  return ownership.claim(run, 'foreground', ownership.last_owner(run))


@pytest.mark.parametrize('launcher', ['foreground', 'local', 'slurm', 'Python'])
def test_a_process_of_this_host_is_seen(run, launcher):
  own(run, launcher)
  with pytest.raises(
    backend.BackendError, match=f'already runs: .*, by {launcher} '
  ) as e:
    claim(run)
  assert f'process {os.getpid()} on ' in str(e.value)
  assert ('manage stop' in str(e.value)) == (launcher != 'Python')
  # The same number is a process of another time, or none.
  for change in ({'created': 1.0}, {'pid': 2**22 + 1}):
    owner = {**dataclasses.asdict(lease.newest(run)), **change}
    files.write_json(run.owner(0), owner)
    assert not ownership.lives(run, lease.newest(run))
  assert claim(run) == 1


def test_a_copy_of_a_run_is_another_run(run):
  """While the run goes on; one that was moved is still the same."""
  own(run, 'local')
  copy = RunDirectory(run.path.with_name('copy'))
  shutil.copytree(run.path, copy.path)
  assert claim(copy) == 1
  assert lease.newest(run).launch == 0
  moved = RunDirectory(run.path.rename(run.path.with_name('moved')))
  with pytest.raises(backend.BackendError, match='already runs'):
    claim(moved)


def test_numbers_go_on_where_nothing_was_noted(run):
  run.path.mkdir()
  files.write_json(run.config, {'launches': 7})  # By an earlier version.
  assert claim(run) == 7
  lease.release(run, 7)
  assert claim(run) == 8


def test_of_two_that_judged_the_same_one_begins(run):
  own(run, 'local', pid=2**22 + 1)
  before = ownership.last_owner(run)
  assert ownership.claim(run, 'local', before) == 1
  with pytest.raises(backend.BackendError, match='already runs'):
    ownership.claim(run, 'slurm', before)


def test_another_host_is_watched(run, capsys, watch):
  watch(60.0)
  own(run, 'foreground', place='elsewhere', host='other')
  stop = threading.Event()

  def beat():
    for count in range(10**6):
      owner = dataclasses.replace(lease.newest(run), beats=count)
      files.write_json(run.owner(0), dataclasses.asdict(owner))
      if stop.wait(0.01):
        return

  thread = threading.Thread(target=beat)
  thread.start()
  try:
    with pytest.raises(backend.BackendError, match=r'already runs.* \(on other\)'):
      claim(run)
    launch = backend.Launch('foreground', {}, programs.make(str(run.path)), {})
    with pytest.raises(backend.BackendError, match='runs on other: stop it there'):
      ownership.check_in_reach(launch)
  finally:
    stop.set()
    thread.join()
  watch(0.2)
  assert 'was last run on other: watching' in capsys.readouterr().err
  assert claim(run) == 1


class TestSlurm:
  """With stand-ins for its commands."""

  def begin(self, run):
    handles = {
      'learner': '7',
      'actor': [{'job': '8', 'first': 0, 'count': 3}],
      'evaluator': '9',
    }
    submitted(run, 'slurm', handles)
    # Where it runs is Slurm's to know; nobody is to be looked for on this host.
    own(run, 'slurm', pid=2**22 + 1)

  @pytest.mark.parametrize('line', ['7|PENDING||Priority', '8_2|RUNNING|n1|None'])
  def test_what_is_pending_runs_too(self, run, command, line):
    self.begin(run)
    command('squeue', f"echo '{line}'")
    with pytest.raises(backend.BackendError, match=r'already runs: .*by slurm'):
      claim(run)

  def test_what_slurm_has_forgotten_has_ended(self, run, command):
    self.begin(run)
    command('squeue', "echo '7|COMPLETED||None'; echo '12|RUNNING|n1|None'")
    assert claim(run) == 1

  def test_where_nobody_can_be_asked_nothing_begins(self, run, command):
    self.begin(run)
    words = r'was submitted to slurm, which cannot be asked.*squeue is not on PATH'
    with pytest.raises(backend.BackendError, match=words):
      claim(run)
    command('squeue', 'echo down >&2; exit 1')
    with pytest.raises(backend.BackendError, match=r'squeue.* failed: down'):
      claim(run)
    run.end('finished')
    assert claim(run) == 1

  def test_the_beats_of_the_learner_are_heard_without_slurm(self, run, command, watch):
    self.begin(run)
    watch(60.0)
    with lease.Heart(run, 0), pytest.raises(backend.BackendError, match='already runs'):
      claim(run)

  def test_a_launch_of_before_says_nothing_of_this_one(self, run, command):
    self.begin(run)
    command('squeue', "echo '7|RUNNING|n1|None'")
    lease.make(run, 1, 'Python')
    lease.release(run, 1)
    assert claim(run) == 2


def test_pods_are_asked_for(run, command):
  submitted(run, 'kubernetes', {'objects': []})
  own(run, 'kubernetes', pid=2**22 + 1)
  pods = '{"items": []}'
  command('kubectl', f"echo '{pods}'")
  with pytest.raises(backend.BackendError, match=r'already runs: .*by kubernetes'):
    claim(run)
  lease.release(run, 0)  # As `manage stop` does.
  assert claim(run) == 1


def test_what_is_left_of_a_detached_run_is_seen(run):
  """Its submitting process is gone, the learner too; an actor goes on."""
  program = programs.with_stand_ins(programs.make(str(run.path), actors=1))
  script = (
    'import json, pathlib, sys; from impala_jax.launching import backends, program; '
    'made = program.from_dict(json.loads(pathlib.Path(sys.argv[1]).read_text())); '
    'backends.get("local").submit(made)'
  )
  path = run.path.parent / 'program.json'
  files.write_json(path, program_lib.to_dict(program))
  own(run, 'local', pid=2**22 + 1)
  subprocess.run(
    [sys.executable, '-c', script, str(path)], cwd=programs.ROOT, check=True, timeout=60
  )
  handles = backend.read_launch(run.path).handles
  (learner,) = handles['learner']
  everybody = [handle for of_role in handles.values() for handle in of_role]
  try:
    with pytest.raises(backend.BackendError, match='already runs'):
      claim(run)
    # The learner's supervisor has made itself known.
    programs.wait(lambda: lease.newest(run).pid == learner['pid'])
    programs.wait(lambda: programs.starts(run.path, 'actor-0'))
    _kill(learner)
    with pytest.raises(backend.BackendError, match='already runs'):
      claim(run)
  finally:
    for handle in everybody:
      _kill(handle)
  assert claim(run) == 1


def _kill(handle):
  process = local.process_of(handle)
  if process is not None:
    for one in (*process.children(recursive=True), process):
      one.kill()
    programs.wait(lambda: local.process_of(handle) is None)


@pytest.mark.parametrize('role', ['learner', 'actor-0'])
def test_supervisors_of_a_launch_that_was_thought_dead_end(run, role):
  program = programs.with_stand_ins(programs.make(str(run.path), actors=1))
  name, _, index = role.partition('-')
  settings = supervision.settings_of(
    program, program.role(name), sys.executable, int(index or 0)
  )
  run.path.mkdir(parents=True)
  assert lease.make(run, 0, 'local')
  said = []
  process = supervision.Supervised(settings, run, say=said.append)
  thread = threading.Thread(target=process.run)
  thread.start()
  name = f'{name}-{index or 0}'
  programs.wait(lambda: programs.starts(run.path, name))
  before = files.read_json(run.supervised(settings.role, settings.index))
  lease.make(run, 1, 'slurm')
  thread.join(60)
  assert not thread.is_alive()
  assert 'belongs to a newer launch' in said[-1]
  assert process.state == 'failed'
  ((_, pid),) = programs.starts(run.path, name)
  assert not psutil.pid_exists(pid)
  # What stands there is the other's by now, and so is the end of the run.
  assert files.read_json(run.supervised(settings.role, settings.index)) == before
  assert run.how_ended() == {}
