"""A whole run whose actors ask an inference server, as a user starts it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests import transports

_LONG = 240.0  # Seconds that a busy machine may take.
_SETTINGS = (
  'actor.num_actors=2',
  'inference.servers=1',
  'learner.metrics_interval=0.5',
  'learner.checkpoint_interval=1',
  'evaluator.enabled=false',
)


class Run:
  """A launcher and what it leaves in the run directory."""

  def __init__(self, run_dir: pathlib.Path, *flags: str):
    self.run_dir = run_dir
    settings = [f'--set={s}' for s in _SETTINGS]
    self.process = subprocess.Popen(
      [
        sys.executable,
        '-m',
        'launch.run_atari',
        '--view=plain',
        '--config=catch',
        f'--run_dir={run_dir}',
        f'--transport={transports.BETWEEN_PROCESSES}',
        *settings,
        *flags,
      ],
      env={k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'},
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )

  def role(self, name: str) -> list[psutil.Process]:
    children = psutil.Process(self.process.pid).children(recursive=True)
    return [p for p in children if p.cmdline()[-1:] == [name]]

  def status(self) -> dict[str, float]:
    try:
      return json.loads((self.run_dir / 'status.json').read_text())
    except (OSError, ValueError):
      return {}

  def log(self, name: str) -> str:
    return (self.run_dir / 'logs' / f'{name}.log').read_text()

  def wait(self, condition, what: str):
    deadline = time.monotonic() + _LONG
    while not (value := condition()):
      if self.process.poll() is not None:
        raise AssertionError(f'{what}: it ended: {self.process.stdout.read()}')
      assert time.monotonic() < deadline, f'{what}: {self.status()}'
      time.sleep(0.1)
    return value

  def trains(self, what: str) -> None:
    before = self.status().get('updates', 0)
    self.wait(lambda: self.status().get('updates', 0) > before + 50, what)

  def serves_again(self, times: int) -> None:
    """Both actors have found the server that was started as the last of so many."""
    words = 'the policy is that of the inference server'
    for actor in ('actor-0', 'actor-1'):
      self.wait(lambda a=actor: self.log(a).count(words) == times, f'{actor} comes')

  def finish(self) -> str:
    return self.process.communicate(timeout=_LONG)[0]


@pytest.fixture
def start(tmp_path):
  started = []

  def make(*flags):
    started.append(Run(tmp_path / 'run', *flags))
    return started[-1]

  yield make
  for run in started:
    if run.process.poll() is None:
      for child in psutil.Process(run.process.pid).children(recursive=True):
        child.kill()
      run.process.kill()
      run.process.communicate()


@pytest.mark.timeout(900)
def test_a_run_trains_by_a_server_that_is_killed_and_one_that_is_told_to_stop(start):
  run = start('--total_frames=1e9')
  run.trains('at first')
  status = run.wait(
    lambda: (s := run.status()).get('inference/clients') == 2 and s, 'both actors'
  )
  assert status['inference/requests_per_second'] > 0
  assert status['inference/environments'] == 32
  assert 1 <= status['inference/batch_mean'] <= 32
  assert 'NPROC' not in run.role('inference')[0].environ()
  assert {p['role'] for p in status['peers']} == {'actor', 'inference'}
  assert status['unrolls_dropped'] == 0

  actors = {p.pid for p in run.role('actor')}
  run.role('inference')[0].kill()
  run.serves_again(2)
  run.trains('after the death of the server')
  # At most what was under way: one unroll of each environment.
  assert run.status()['unrolls_dropped'] <= 32

  # Told to stop by somebody else than its supervisor: it comes back, too.
  run.role('inference')[0].send_signal(signal.SIGTERM)
  run.serves_again(3)
  run.trains('after the server has left')
  assert {p.pid for p in run.role('actor')} == actors

  children = psutil.Process(run.process.pid).children(recursive=True)
  run.process.send_signal(signal.SIGINT)
  output = run.finish()
  assert run.process.returncode == 0, output
  assert not [c for c in children if c.is_running() and c.status() != 'zombie']
  last = json.loads((run.run_dir / 'metrics.jsonl').read_text().splitlines()[-1])
  assert last['unrolls_lost'] == last['unrolls_corrupted'] == 0
  assert last['inference/refused'] == 0
  assert last['unrolls_dropped'] <= 64
  assert 'CAUSE' not in run.log('inference') + run.log('actor-0') + run.log('actor-1')


@pytest.mark.timeout(600)
def test_the_end_of_the_frames_ends_the_servers(start):
  run = start('--total_frames=60000')
  output = run.finish()
  assert run.process.returncode == 0, output
  assert run.status()['frames'] >= 60000
  assert 'CAUSE' not in run.log('inference')


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
  ('setting', 'role'),
  [('inference.platform=tpu', 'inference'), ('actor.platform=tpu', 'actor-0')],
)
def test_a_device_that_is_not_there_is_one_clear_error(start, setting, role):
  settings = [f'--set={setting}']
  if role == 'actor-0':
    settings.append('--set=inference.servers=0')
  run = start('--total_frames=1e9', *settings)
  words = f"CAUSE: ConfigError: {setting.split('=')[0]} is 'tpu': JAX finds no such"
  path = run.run_dir / 'logs' / f'{role}.log'
  run.wait(lambda: path.exists() and words in run.log(role), words)
