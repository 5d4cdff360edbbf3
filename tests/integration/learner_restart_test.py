"""Real roles, none of them restarted but the learner: killed, moved, told to leave."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from impala_jax import config as config_lib
from impala_jax import configs
from impala_jax.distributed.roles import run as run_role
from impala_jax.launching import run_directory
from impala_jax.runtime import files
from tests import transports

_LONG = 240.0  # Seconds that a busy machine may take.


class Run:
  """The processes of a run as supervisors start them, without the supervisors."""

  def __init__(self, folder: pathlib.Path):
    config = config_lib.override(
      configs.get('catch'),
      [
        'learner.total_frames=1e9',
        'learner.metrics_interval=0.5',
        'learner.checkpoint_interval=1',
        'evaluator.interval=1',
        f'transport.kind={transports.BETWEEN_PROCESSES}',
      ],
    )
    self.run_dir = run_directory.create(config, str(folder))
    self.processes: dict[str, subprocess.Popen[bytes]] = {}

  def start(self, role: str, **variables: str) -> subprocess.Popen[bytes]:
    environment = {
      **os.environ,
      'IMPALA_RUN_DIR': str(self.run_dir),
      'IMPALA_PARENT': str(os.getpid()),
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '',
      'PYTHONUNBUFFERED': '1',
      **variables,
    }
    with open(self.run_dir / f'{role}.log', 'ab') as log:
      self.processes[role] = subprocess.Popen(
        [sys.executable, '-m', 'impala_jax.distributed.roles.run', role],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
      )
    return self.processes[role]

  def close(self) -> None:
    for process in self.processes.values():
      process.kill()
      process.wait()

  def record(self) -> dict[str, float]:
    lines = (self.run_dir / 'metrics.jsonl').read_text().splitlines()
    return json.loads(lines[-1])

  def status(self) -> dict[str, float]:
    try:
      return json.loads((self.run_dir / 'status.json').read_text())
    except (OSError, ValueError):
      return {}

  def lines(self, name: str) -> list[str]:
    path = self.run_dir / name
    return path.read_text().splitlines() if path.exists() else []

  def log(self, role: str) -> str:
    return '\n'.join(self.lines(f'{role}.log'))

  def wait(self, condition, what: str) -> None:
    """All processes but those that were killed must stay alive."""
    deadline = time.monotonic() + _LONG
    while not condition():
      alive = [p.poll() is None for p in self.processes.values()]
      logs = {role: self.log(role)[-2000:] for role in self.processes}
      assert all(alive), f'{what}: a process has ended: {logs}'
      assert time.monotonic() < deadline, f'{what}: {logs}'
      time.sleep(0.2)

  def trains(self, what: str) -> None:
    """Waits for updates of the present learner, of unrolls by its parameters."""
    before, since = self.status().get('updates', 0), time.time() + 1.0
    self.wait(
      lambda: (
        (s := self.status()).get('time', 0) > since
        and s['updates'] > before + 20
        and s['policy_lag_max'] >= s['policy_lag_mean'] >= 0
      ),
      what,
    )

  def end(self, role: str, code: int = 0) -> None:
    process = self.processes.pop(role)
    assert process.wait(_LONG) == code, self.log(role)[-2000:]


@pytest.fixture
def run(tmp_path):
  run = Run(tmp_path / 'run')
  yield run
  run.close()


@pytest.mark.timeout(1200)
def test_actor_and_evaluator_outlive_learners(run):
  run.start('learner')
  run.start('actor', IMPALA_PATIENCE='600')
  run.start('evaluator', IMPALA_PATIENCE='600')
  run.trains('at first')
  run.wait(lambda: run.lines('evaluations.jsonl'), 'an evaluation')

  # Killed, with the updates since its last checkpoint.
  first = json.loads((run.run_dir / 'address.json').read_text())
  run.processes.pop('learner').kill()
  run.start('learner')
  run.wait(
    lambda: json.loads((run.run_dir / 'address.json').read_text()) != first,
    'another address',
  )
  run.trains('after the death of the learner')
  assert 'takes version' in run.log('actor')
  evaluations = len(run.lines('evaluations.jsonl'))
  run.wait(lambda: len(run.lines('evaluations.jsonl')) > evaluations, 'an evaluation')

  # Told to end although the run goes on, as before the end of a job's time.
  run.processes['learner'].send_signal(signal.SIGTERM)
  run.end('learner', run_role.STOPPED)
  last = run.record()
  assert last['unrolls_lost'] == last['unrolls_duplicated'] == 0
  assert last['unrolls_refused'] == 0  # Not even of parameters ahead of the checkpoint.
  assert 'leaves; waits for another' in run.log('actor')
  run.start('learner')
  run.trains('after the learner has left')

  # Stopped for good: all leave, with a last evaluation.
  evaluations = len(run.lines('evaluations.jsonl'))
  files.write_json(run.run_dir / 'ended.json', {'reason': 'stopped'})
  run.processes['learner'].send_signal(signal.SIGTERM)
  run.end('learner', run_role.STOPPED)
  for role in ('actor', 'evaluator'):
    run.end(role)
  assert len(run.lines('evaluations.jsonl')) > evaluations
  last = run.record()
  assert last['unrolls_lost'] == last['unrolls_duplicated'] == 0
  assert last['unrolls_corrupted'] == 0
  assert 'CAUSE' not in run.log('actor') + run.log('evaluator')


@pytest.mark.timeout(600)
def test_an_actor_gives_up_with_the_cause(run):
  run.start('learner')
  actor = run.start('actor', IMPALA_PATIENCE='5')
  run.trains('at first')
  run.processes.pop('learner').kill()
  assert actor.wait(_LONG) == 1
  assert 'CAUSE: TransportError: actor 0 has been without its learner for 5 s' in (
    run.log('actor')
  )
