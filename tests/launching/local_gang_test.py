"""Several learners on one machine: started, shown, restarted and ended together."""

import contextlib
import functools
import os
import signal

import psutil
import pytest

from experiments.soak import processes as soak_processes
from impala_jax.commands import manage
from impala_jax.launching import backends, local_gang
from impala_jax.runtime import files
from tests.launching import programs

# Fails in the first learner; the second ends because of that, as real ones do.
ONE_FAILS = """
import os, time
if os.environ['IMPALA_INDEX'] == '0':
  print('CAUSE: GangError: learner 1 has left; its own log says why')
else:
  print('CAUSE: ValueError: no such game')
raise SystemExit(1)
"""

wait = functools.partial(programs.wait, seconds=120)


@pytest.fixture
def launched(tmp_path):
  """Starts two stand-ins for learners; whatever is left at the end is killed."""
  run_dir = tmp_path / 'run'

  def launch(max_restarts=3, **scripts):
    program = programs.make(str(run_dir), actors=1, learners=2)
    program = programs.with_stand_ins(program, max_restarts, scripts)
    backends.get('local', ['local.learners=2']).submit(program)
    return run_dir

  yield launch
  for process in soak_processes.of_run(run_dir):
    with contextlib.suppress(psutil.Error):
      process.kill()


def learners(run_dir):
  return [t for t in manage.status(run_dir)['tasks'] if t['role'] == 'learner']


def starts(run_dir, index):
  return programs.starts(run_dir, f'learner-{index}')


def test_a_gang_restarts_and_stops_as_a_unit(launched):
  run_dir = launched()
  wait(lambda: starts(run_dir, 0) and starts(run_dir, 1))
  assert [(t['index'], t['state'], t['restarts']) for t in learners(run_dir)] == [
    (0, 'running', 0),
    (1, 'running', 0),
  ]
  (_, first), (_, second) = starts(run_dir, 0)[0], starts(run_dir, 1)[0]
  os.kill(second, signal.SIGKILL)
  # The first notices nothing, as one that hangs: it is killed.
  wait(lambda: len(starts(run_dir, 0)) == len(starts(run_dir, 1)) == 2)
  assert not psutil.pid_exists(first)
  assert not (run_dir / 'learner-0.told').exists()
  # Another incarnation, and each the same.
  assert [starts(run_dir, i)[1][0] for i in (0, 1)] == [1, 1]
  wait(lambda: [t['restarts'] for t in learners(run_dir)] == [1, 1])
  assert not (run_dir / 'ended.json').exists()

  launch = backends.backend.read_launch(run_dir)
  (run_dir / 'evaluator-0.finish').touch()
  assert backends.of_launch(launch).stop(launch) == 'stopped'
  for index in (0, 1):
    assert (run_dir / f'learner-{index}.told').exists()
    assert not psutil.pid_exists(starts(run_dir, index)[1][1])
  assert {t['state'] for t in learners(run_dir)} == {'done'}


def test_a_crash_loop_ends_the_run_with_the_cause_of_the_one_at_fault(launched):
  run_dir = launched(max_restarts=1, learner=ONE_FAILS)
  ended = wait(lambda: files.read_json(run_dir / 'ended.json'))
  assert ended['reason'] == 'failed'
  assert 'learner 1 ended with exit code 1: ValueError: no such game' in ended['cause']
  assert 'GangError' not in ended['cause']


def test_learners_end_when_their_supervisor_was_killed(launched):
  run_dir = launched()
  wait(lambda: starts(run_dir, 0) and starts(run_dir, 1))
  (handle,) = backends.backend.read_launch(run_dir).handles['learner']
  os.kill(handle['pid'], signal.SIGKILL)
  for index in (0, 1):
    wait(lambda i=index: (run_dir / f'learner-{i}.told').exists())
    wait(lambda i=index: not psutil.pid_exists(starts(run_dir, i)[0][1]))


def test_the_cause_is_that_of_the_one_at_fault():
  follower = 'learner 0 ended with exit code 1: GangError: learner 1 has left'
  assert local_gang.cause([follower, 'learner 1 was killed']) == 'learner 1 was killed'
  assert local_gang.cause([follower]) == follower
  assert local_gang.cause([]) == ''


def test_the_plan_has_one_supervisor_for_all_learners():
  files = backends.get('local', ['local.learners=4']).render(programs.make(learners=4))
  (line,) = (x for x in files['plan.sh'].splitlines() if 'roles.run learner' in x)
  outer, gang, _ = line.split(' -- ')
  assert ' impala_jax.launching.supervise learner-gang ' in outer
  assert '--essential' in outer
  assert ' impala_jax.launching.local_gang --count=4 ' in gang
  assert 'export IMPALA_COUNT=4' in files['plan.sh']
