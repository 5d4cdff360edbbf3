"""Runs of stand-in roles on this machine, looked after as those on a cluster are."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

from impala_jax.commands import manage
from impala_jax.launching import backends
from impala_jax.launching import program as program_lib
from impala_jax.launching.backends import backend
from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory
from tests.launching import programs
from tests.launching.programs import starts, wait

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def launched(tmp_path):
  """Starts a program of stand-ins; whatever is left at the end is killed."""
  started = []

  def launch(actors=2, max_restarts=3, **scripts):
    program = programs.make(str(tmp_path / 'run'), actors=actors)
    program = programs.with_stand_ins(program, max_restarts, scripts)
    started.append(backends.get('local').submit(program))
    return pathlib.Path(program.run_dir)

  yield launch
  for handles in [backend.read_launch(s.run_dir).handles for s in started]:
    for handle in (h for hs in handles.values() for h in hs):
      try:
        parent = psutil.Process(handle['pid'])
        for process in (*parent.children(recursive=True), parent):
          process.kill()
      except psutil.Error:
        continue


def run_manage(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'launch.manage', *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


def states(run_dir):
  return {(t['role'], t['index']): t['state'] for t in manage.status(run_dir)['tasks']}


def test_status_logs_scale_and_stop(launched):
  run_dir = launched(actors=2)
  names = ('learner-0', 'actor-0', 'actor-1', 'evaluator-0')
  wait(lambda: all(starts(run_dir, n) for n in names))
  done = run_manage('status', run_dir)
  assert done.returncode == 0, done.stderr
  assert 'impala-run on local' in done.stdout
  assert 'nothing heard of the learner yet' in done.stdout
  assert set(states(run_dir).values()) == {'running'}
  report = json.loads(run_manage('status', run_dir, '--json').stdout)
  assert len(report['tasks']) == 4

  assert run_manage('logs', run_dir, 'actor', '1').stdout == 'hello from actor-1\n'
  assert run_manage('logs', run_dir).stdout == 'hello from learner-0\n'

  assert run_manage('scale', run_dir, 'actors', '3').stdout == 'actor: 2 -> 3\n'
  wait(lambda: starts(run_dir, 'actor-2'))
  assert states(run_dir)[('actor', 2)] == 'running'
  assert run_manage('scale', run_dir, 'actors', '1').stdout == 'actor: 3 -> 1\n'
  assert [k for k in states(run_dir) if k[0] == 'actor'] == [('actor', 0)]
  assert (run_dir / 'actor-2.told').exists()
  assert not (run_dir / 'actor-0.told').exists()
  # An index that comes back is another incarnation.
  run_manage('scale', run_dir, 'actors', '2')
  incarnations = wait(lambda: len(s := starts(run_dir, 'actor-1')) == 2 and s)
  assert incarnations[1][0] > incarnations[0][0]

  # As real roles do, when the learner tells them.
  (run_dir / 'evaluator-0.finish').touch()
  done = run_manage('stop', run_dir)
  assert done.stdout == 'stopped\n', done.stderr
  assert (run_dir / 'learner-0.told').exists()
  assert set(states(run_dir).values()) == {'done'}
  assert manage.status(run_dir)['ended']['reason'] == 'stopped'
  for name in names:
    assert not psutil.pid_exists(starts(run_dir, name)[-1][1])
  # Afterwards there is nothing to scale, and nothing to stop.
  done = run_manage('scale', run_dir, 'actors', '3')
  assert (done.returncode, done.stdout) == (1, '')
  assert 'the run stopped: nothing is left to scale' in done.stderr
  assert run_manage('stop', run_dir).stdout == 'the run stopped before; stopped\n'
  # Nor where nobody could say that it ended.
  RunDirectory(run_dir).ended.unlink()
  done = run_manage('scale', run_dir, 'actors', '3')
  assert (done.returncode, done.stdout) == (1, '')
  assert 'its learner has gone' in done.stderr
  assert len(backend.read_launch(run_dir).handles['actor']) == 2


def test_a_killed_process_comes_back_with_a_new_incarnation(launched):
  run_dir = launched(actors=1)
  first = wait(lambda: starts(run_dir, 'actor-0'))[0]
  os.kill(first[1], signal.SIGKILL)
  second = wait(lambda: len(s := starts(run_dir, 'actor-0')) == 2 and s)[1]
  assert second[0] == first[0] + 1
  task = next(t for t in manage.status(run_dir)['tasks'] if t['role'] == 'actor')
  assert (task['restarts'], task['state']) == (1, 'running')


def test_a_killed_learner_comes_back_too(launched):
  run_dir = launched(actors=1)
  first = wait(lambda: starts(run_dir, 'learner-0'))[0]
  os.kill(first[1], signal.SIGKILL)
  wait(lambda: len(starts(run_dir, 'learner-0')) == 2)
  assert not (run_dir / 'ended.json').exists()


def test_one_that_another_told_to_stop_comes_back(launched):
  run_dir = launched(actors=1)
  first = wait(lambda: starts(run_dir, 'learner-0'))[0]
  os.kill(first[1], signal.SIGTERM)
  wait(lambda: len(starts(run_dir, 'learner-0')) == 2)
  assert not (run_dir / 'ended.json').exists()
  task = next(t for t in manage.status(run_dir)['tasks'] if t['role'] == 'learner')
  assert (task['restarts'], task['state']) == (1, 'running')


def test_crash_loops_end_with_the_cause(launched):
  run_dir = launched(actors=2, max_restarts=1, learner=programs.CRASH)
  ended = wait(lambda: files.read_json(run_dir / 'ended.json'))
  assert ended['reason'] == 'failed'
  assert 'exit code 3: ValueError: no such game' in ended['cause']
  (run_dir / 'evaluator-0.finish').touch()
  # Nobody waits for a learner that will not come back.
  wait(lambda: 'running' not in states(run_dir).values())
  assert states(run_dir)[('learner', 0)] == 'failed'
  assert states(run_dir)[('actor', 0)] == 'done'
  assert 'no such game' in run_manage('status', run_dir).stdout


def test_the_run_ends_when_all_actors_have_failed(launched):
  run_dir = launched(actors=2, max_restarts=0, actor=programs.CRASH)
  ended = wait(lambda: files.read_json(run_dir / 'ended.json'))
  assert ended['reason'] == 'failed'
  assert 'all actors' in ended['cause']
  assert 'no such game' in ended['cause']
  wait(lambda: states(run_dir)[('learner', 0)] == 'done')


def test_one_failed_actor_does_not_end_the_run(launched):
  second = "import os\nif os.environ['IMPALA_INDEX'] == '1':\n  "
  script = second + programs.CRASH + '\n' + programs.WORK
  run_dir = launched(actors=2, max_restarts=0, actor=script)
  wait(lambda: states(run_dir)[('actor', 1)] == 'failed')
  time.sleep(3)  # The learner's supervisor looks every two seconds.
  assert not (run_dir / 'ended.json').exists()
  assert states(run_dir)[('actor', 0)] == 'running'


def test_a_finished_learner_ends_the_run(launched):
  run_dir = launched(actors=1)
  wait(lambda: starts(run_dir, 'learner-0') and starts(run_dir, 'actor-0'))
  for name in ('learner-0', 'actor-0', 'evaluator-0'):
    (run_dir / f'{name}.finish').touch()
  wait(lambda: set(states(run_dir).values()) == {'done'})
  assert manage.status(run_dir)['ended']['reason'] == 'finished'
  # A new launch goes on with new incarnations, whatever ended before.
  before = starts(run_dir, 'actor-0')[-1][0]
  for name in ('learner-0', 'actor-0', 'evaluator-0'):
    (run_dir / f'{name}.finish').unlink()
  launched(actors=1)
  again = wait(lambda: len(s := starts(run_dir, 'actor-0')) == 2 and s)
  assert again[1][0] > before
  assert not (run_dir / 'ended.json').exists()


def test_actors_are_left_alone_when_the_learner_moves(launched):
  note = "\nimport os, pathlib\npathlib.Path(os.environ['IMPALA_RUN_DIR'], "
  note += "'patience').write_text(os.environ['IMPALA_PATIENCE'])\n"
  run_dir = launched(actors=1, actor=note + programs.WORK)
  (run_dir / 'address.json').write_text('{"control": "a:1"}')
  wait(lambda: starts(run_dir, 'actor-0'))
  # They look where it is, and are told how long to wait for it.
  assert (run_dir / 'patience').read_text() == '43200.0'
  (run_dir / 'address.json').write_text('{"control": "b:2"}')
  time.sleep(5)  # Supervisors look every two seconds.
  assert len(starts(run_dir, 'actor-0')) == 1


def test_an_actor_without_a_learner_is_given_up(tmp_path):
  supervisor = subprocess.run(
    [
      sys.executable,
      '-m',
      'impala_jax.launching.supervise',
      'actor',
      '--patience=3',
      '--',
      sys.executable,
      '-c',
      programs.WORK,
      'actor',
    ],
    cwd=ROOT,
    env={**os.environ, 'IMPALA_RUN_DIR': str(tmp_path)},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert supervisor.returncode == 1
  assert 'actor 0: no learner for 3 s' in supervisor.stdout
  assert (tmp_path / 'actor-0.told').exists()
  record = files.read_json(RunDirectory(tmp_path).supervised('actor', 0))
  assert (record['state'], record['words']) == ('failed', 'no learner for 3 s')


def test_processes_that_cannot_all_be_started_are_all_ended(launched, monkeypatch):
  run_dir = launched(actors=1)
  wait(
    lambda: all(starts(run_dir, f'{n}-0') for n in ('learner', 'actor', 'evaluator'))
  )
  launch, started = backend.read_launch(run_dir), []
  popen = subprocess.Popen

  def refuse_the_third(*args, **kwargs):
    if len(started) == 2:
      raise BlockingIOError(11, 'Resource temporarily unavailable')
    started.append(popen(*args, **kwargs))
    return started[-1]

  monkeypatch.setattr(subprocess, 'Popen', refuse_the_third)
  words = 'temporarily unavailable: what had been started was ended'
  with pytest.raises(backend.BackendError, match=words):
    backends.of_launch(launch).scale(launch, 'actor', 4)
  assert None not in [p.poll() for p in started]
  # As it was.
  monkeypatch.undo()
  assert backend.read_launch(run_dir).program.role('actor').replicas == 1
  assert set(states(run_dir).values()) == {'running'}


def test_what_was_submitted_is_read_back(launched):
  run_dir = launched(actors=2)
  launch = backend.read_launch(run_dir)
  assert launch.program.role('actor').replicas == 2
  assert isinstance(launch.program, program_lib.Program)
  assert backends.of_launch(launch).name == 'local'


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (['scale', 'RUN', 'learner', '2'], 'learner has 1 and cannot be scaled'),
    (['scale', 'RUN', 'actors', 'many'], "N is 'many'"),
    (['scale', 'RUN', 'actors', '0'], 'must be at least 1'),
    (['scale', 'RUN', 'actors', '-1'], "N is '-1': must be a whole number"),
    (['scale', 'RUN', 'actors', '9' * 40], 'must be a whole number up to 9,999,999'),
    (['scale', 'RUN'], 'write scale RUN_DIR actors N'),
    (['logs', 'RUN', 'actor', '7'], 'actor 7: there are 0 to 0'),
    (['logs', 'RUN', 'acter'], 'learner, actor, evaluator'),
    (['status', '/nonexistent'], 'no launched run'),
    (['restart', 'RUN'], 'must be one of status, logs, scale, stop'),
  ],
)
def test_mistakes_get_one_clear_message(launched, arguments, words):
  run_dir = launched(actors=1)
  done = run_manage(*[run_dir if a == 'RUN' else a for a in arguments])
  assert done.returncode in (1, 2)
  assert words in done.stderr
  assert 'Traceback' not in done.stderr


class TestKubernetes:
  """With a stand-in for kubectl that notes what it was asked."""

  @pytest.fixture
  def kubectl(self, tmp_path, monkeypatch):
    """Sets what `kubectl` answers; returns a function that gives its calls."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    calls = tmp_path / 'calls'
    answer = tmp_path / 'answer'
    answer.write_text('')
    script = folder / 'kubectl'
    script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ncat {answer}\n')
    script.chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder}{os.pathsep}{os.environ["PATH"]}')
    self.answer = answer
    self.script = script
    return lambda: calls.read_text().splitlines() if calls.exists() else []

  def submit(self, tmp_path):
    kubernetes = backends.get('kubernetes', ['kubernetes.namespace=lab'])
    program = programs.make(str(tmp_path / 'run'))
    return kubernetes, kubernetes.submit(program)

  def test_submit_scale_and_stop(self, tmp_path, kubectl):
    kubernetes, launch = self.submit(tmp_path)
    asked, *applied = kubectl()
    assert asked.startswith('--namespace=lab get ')
    assert len(applied) == 8
    assert all(c.startswith('--namespace=lab apply -f ') for c in applied)
    for call in applied:
      assert pathlib.Path(call.split()[-1]).exists()
    assert kubernetes.scale(launch, 'actor', 5) == 'actor: 3 -> 5'
    patch = kubectl()[-1]
    assert 'patch job/impala-run-actor' in patch
    assert '{"spec": {"parallelism": 5, "completions": 5}}' in patch
    assert backend.read_launch(launch.run_dir).program.role('actor').replicas == 5
    assert 'kept PersistentVolumeClaim/impala-run-run' in kubernetes.stop(launch)
    learner, rest = kubectl()[-2:]
    assert learner.endswith('JobSet/impala-run')
    assert 'Job/impala-run-actor' in rest
    assert 'PersistentVolumeClaim' not in rest

  def test_status_takes_the_newest_pod_of_each_index(self, tmp_path, kubectl):
    kubernetes, launch = self.submit(tmp_path)

    def pod(name, role, index, created, phase, **status):
      return {
        'metadata': {
          'name': name,
          'labels': {'impala-jax/role': role},
          'annotations': {'batch.kubernetes.io/job-completion-index': str(index)},
          'creationTimestamp': created,
        },
        'spec': {'nodeName': 'node-7'},
        'status': {'phase': phase, **status},
      }

    waiting = [{'state': {'waiting': {'reason': 'ImagePullBackOff'}}}]
    self.answer.write_text(
      json.dumps(
        {
          'items': [
            pod('a-0-new', 'actor', 0, '2026-01-02T00:00:00Z', 'Running'),
            pod('a-0-old', 'actor', 0, '2026-01-01T00:00:00Z', 'Failed'),
            pod(
              'a-1',
              'actor',
              1,
              '2026-01-01T00:00:00Z',
              'Pending',
              containerStatuses=waiting,
            ),
            pod('l', 'learner', 0, '2026-01-01T00:00:00Z', 'Running'),
          ]
        }
      )
    )
    found = {(t.role, t.index): t for t in kubernetes.status(launch)}
    assert found['actor', 0].state == 'running'
    assert found['actor', 0].where == 'node-7'
    assert found['actor', 1].state == 'pending'
    assert 'ImagePullBackOff' in found['actor', 1].detail
    assert found['actor', 2].detail == 'no pod yet'
    assert found['learner', 0].state == 'running'

  def test_a_cluster_without_job_sets_is_left_alone(self, tmp_path, kubectl):
    text = self.script.read_text()
    refuse = 'case "$*" in *JobSet*) echo "no JobSet here" >&2; exit 1;; esac'
    self.script.write_text(text.replace('cat ', f'{refuse}\ncat '))
    with pytest.raises(backend.BackendError, match='no JobSet here'):
      self.submit(tmp_path)
    assert len(kubectl()) == 1
    assert not (tmp_path / 'run' / 'launch.json').exists()

  def test_without_kubectl_one_clear_error(self, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(backend.BackendError, match='kubectl is not on PATH here'):
      self.submit(tmp_path)
