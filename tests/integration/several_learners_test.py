"""Whole runs with two learner processes on this machine, as a user launches them."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from experiments.soak import processes as soak_processes
from impala_jax.commands import manage
from impala_jax.learning import checkpointing
from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory
from tests import transports

pytestmark = pytest.mark.timeout(900)


def launch(run_dir: pathlib.Path, *flags: str) -> None:
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'launch.run_atari',
      '--config=catch',
      '--launcher=local',
      '--launcher_set=local.learners=2',
      f'--run_dir={run_dir}',
      f'--transport={transports.BETWEEN_PROCESSES}',
      '--set=learner.checkpoint_interval=2',
      '--set=evaluator.enabled=false',
      *flags,
    ],
    env=environment,
    text=True,
    capture_output=True,
    check=False,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr


def learner(run_dir: pathlib.Path, index: int) -> psutil.Process | None:
  """The process itself, not its supervisors."""
  for process in soak_processes.of_run(run_dir):
    try:
      command, environment = process.cmdline(), process.environ()
    except psutil.Error:
      continue
    if command[-2:] != ['impala_jax.distributed.roles.run', 'learner']:
      continue
    if 'impala_jax.launching.local_gang' not in command and environment.get(
      'IMPALA_INDEX'
    ) == str(index):
      return process
  return None


@pytest.fixture
def run_dir(tmp_path):
  path = tmp_path / 'run'
  yield path
  for process in soak_processes.of_run(path):
    process.kill()


def wait_for(run_dir: pathlib.Path, condition, what: str, seconds: float = 240.0):
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if value := condition():
      return value
    time.sleep(0.2)
  logs = '\n'.join(
    f'== {path.name}\n' + '\n'.join(path.read_text().splitlines()[-12:])
    for path in sorted((run_dir / 'logs').iterdir())
  )
  raise AssertionError(f'{what}: not within {seconds:.0f} s\n{logs}')


def updates(run_dir: pathlib.Path) -> int:
  return int(files.read_json(run_dir / 'status.json').get('updates', 0))


def log(run_dir: pathlib.Path, index: int) -> str:
  path = RunDirectory(run_dir).log('learner', index)
  return path.read_text() if path.exists() else ''


def stop(run_dir: pathlib.Path) -> None:
  done = subprocess.run(
    [sys.executable, '-m', 'launch.manage', 'stop', run_dir],
    text=True,
    capture_output=True,
    check=False,
    timeout=300,
  )
  assert done.stdout.strip() == 'stopped', done.stdout + done.stderr


def ends(run_dir: pathlib.Path) -> list[int]:
  """Updates at which the learners ended in order, so far; the same of both."""
  first, second = (
    re.findall(r'ended at (\d+) updates', log(run_dir, i)) for i in (0, 1)
  )
  assert first == second
  return [int(n) for n in first]


def test_a_run_trains_stops_and_resumes(run_dir):
  launch(run_dir, '--total_frames=1e9', '--num_actors=2')
  wait_for(run_dir, lambda: updates(run_dir) > 20, 'it trains')
  # Each learner has a queue and an actor of its own, and learner 0 knows of all.
  first, second = (
    json.loads((run_dir / name).read_text())
    for name in ('address.json', 'address-1.json')
  )
  assert first['learners'] == 2
  assert len({first['transport'], first['control']} | set(second.values())) == 4
  known = lambda: {
    (p['role'], p['index'])
    for p in files.read_json(run_dir / 'status.json').get('peers', [])
  }
  everyone = {('learner', 1), ('actor', 0), ('actor', 1)}
  wait_for(run_dir, lambda: known() >= everyone, 'learner 0 hears of all')
  report = manage.status(run_dir)
  assert [(t['role'], t['index'], t['state']) for t in report['tasks']] == [
    ('learner', 0, 'running'),
    ('learner', 1, 'running'),
    ('actor', 0, 'running'),
    ('actor', 1, 'running'),
  ]

  stop(run_dir)
  assert soak_processes.of_run(run_dir) == []
  (last,) = ends(run_dir)
  saved = checkpointing.read(checkpointing.paths(run_dir / 'checkpoints')[-1])
  assert saved['metadata']['updates'] == int(saved['state']['updates']) == last
  record = files.read_json_lines(run_dir / 'metrics.jsonl')[-1]
  assert record['updates'] == last
  assert record['frames'] == last * 16 * 9

  launch(run_dir, '--resume', f'--total_frames={record["frames"] + 5000}')
  ending = wait_for(run_dir, lambda: files.read_json(run_dir / 'ended.json'), 'it ends')
  assert ending['reason'] == 'finished', ending
  wait_for(run_dir, lambda: not soak_processes.of_run(run_dir), 'all have left')
  record = files.read_json_lines(run_dir / 'metrics.jsonl')[-1]
  assert ends(run_dir) == [last, record['updates']]
  assert record['updates'] == -(-(last * 144 + 5000) // 144)
  # Whole batches of both.
  assert record['unrolls_received'] >= (record['updates'] - last) * 16
  assert record['unrolls_duplicated'] == record['unrolls_corrupted'] == 0


def test_learners_that_are_killed_or_told_to_leave_come_back_together(run_dir):
  launch(run_dir, '--total_frames=1e9', '--num_actors=2')
  wait_for(run_dir, lambda: checkpointing.paths(run_dir / 'checkpoints'), 'saved')
  killed = learner(run_dir, 1)
  other = learner(run_dir, 0)
  trained = updates(run_dir)
  killed.kill()
  wait_for(run_dir, lambda: not other.is_running(), 'learner 0 ends, too')
  resumed = lambda: log(run_dir, 0).count('goes on from')
  wait_for(run_dir, lambda: resumed() == 1, 'both start again')
  wait_for(run_dir, lambda: updates(run_dir) > trained + 20, 'it trains again')
  steps = [re.findall(r'goes on from \S+_(\d+)\.', log(run_dir, i)) for i in (0, 1)]
  assert steps[0] == steps[1]
  assert 'GangError: learner 1 has left' in log(run_dir, 0)
  assert {t['restarts'] for t in manage.status(run_dir)['tasks'][:2]} == {1}

  # As a host that is to be freed does it: nothing is lost, and the run goes on.
  learner(run_dir, 1).send_signal(signal.SIGTERM)
  wait_for(run_dir, lambda: resumed() == 2, 'both start again')
  (left,) = ends(run_dir)
  came_back = f'goes on from {run_dir}/checkpoints/checkpoint_{left:010d}'
  for index in (0, 1):
    wait_for(run_dir, lambda i=index: came_back in log(run_dir, i), 'goes on')
  wait_for(run_dir, lambda: updates(run_dir) > left + 20, 'it trains again')


def test_it_stops_where_one_learner_has_no_actor(run_dir):
  launch(run_dir, '--total_frames=1e9', '--num_actors=1')
  known = lambda: {
    (p['role'], p['index'])
    for p in files.read_json(run_dir / 'status.json').get('peers', [])
  }
  wait_for(run_dir, lambda: known() >= {('actor', 0), ('learner', 1)}, 'all are up')
  assert updates(run_dir) == 0
  stop(run_dir)
  assert soak_processes.of_run(run_dir) == []
  for index in (0, 1):
    assert 'ended at 0 updates' in log(run_dir, index)
  assert len(checkpointing.paths(run_dir / 'checkpoints')) == 1
