"""The main job as a user runs it: processes, signals, resume, mistakes, failures."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

from impala_jax.learning import checkpointing
from tests import transports


def _command(*flags: str) -> list[str]:
  return [sys.executable, '-m', 'launch.run_atari', '--view=plain', *flags]


def _start(run_dir: pathlib.Path, *flags: str) -> subprocess.Popen[str]:
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  return subprocess.Popen(
    _command(
      '--config=catch',
      f'--run_dir={run_dir}',
      '--set=evaluator.interval=2',
      '--set=learner.checkpoint_interval=1',
      *flags,
    ),
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )


def _wait_for(condition, process: subprocess.Popen[str], seconds: float = 120.0):
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    value = condition()
    if value:
      return value
    if process.poll() is not None:
      raise AssertionError(f'the run ended: {process.stdout.read()}')
    time.sleep(0.1)
  process.kill()
  raise AssertionError(f'not within {seconds} s')


def _updates(run_dir: pathlib.Path) -> int:
  try:
    return json.loads((run_dir / 'status.json').read_text())['updates']
  except (OSError, ValueError):
    return 0


def _descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
  return psutil.Process(process.pid).children(recursive=True)


def _role(process: subprocess.Popen[str], role: str) -> psutil.Process:
  return next(p for p in _descendants(process) if p.cmdline()[-1:] == [role])


def _replaced(
  process: subprocess.Popen[str], role: str, before: psutil.Process
) -> bool:
  try:
    return _role(process, role).pid != before.pid
  except (StopIteration, psutil.Error):
    return False


def _finish(process: subprocess.Popen[str], seconds: float = 90.0) -> str:
  try:
    output, _ = process.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    process.kill()
    raise
  return output


@pytest.mark.parametrize('transport', ['local', transports.BETWEEN_PROCESSES])
def test_interrupt_leaves_a_checkpoint_and_resume_goes_on(tmp_path, transport):
  run_dir = tmp_path / 'run'
  process = _start(run_dir, f'--transport={transport}', '--total_frames=1e9')
  _wait_for(lambda: _updates(run_dir) > 20, process)
  children = _descendants(process)
  process.send_signal(signal.SIGINT)
  output = _finish(process)
  assert process.returncode == 0, output
  assert not [c for c in children if c.is_running() and c.status() != 'zombie']
  saved = checkpointing.read(checkpointing.paths(run_dir / 'checkpoints')[-1])
  updates = saved['metadata']['updates']
  last = json.loads((run_dir / 'metrics.jsonl').read_text().splitlines()[-1])
  assert last['updates'] == updates > 20
  assert last['unrolls_lost'] == last['unrolls_corrupted'] == 0
  assert (run_dir / 'learning_curve.png').read_bytes()[:4] == b'\x89PNG'
  assert (run_dir / 'evaluations.jsonl').exists()
  config = json.loads((run_dir / 'config.json').read_text())
  assert len(config['git']) >= 7
  assert list((run_dir / 'tensorboard').iterdir())

  process = _start(run_dir, '--resume', f'--total_frames={last["frames"] + 20_000}')
  output = _finish(process, 150)
  assert process.returncode == 0, output
  records = [
    json.loads(x) for x in (run_dir / 'metrics.jsonl').read_text().splitlines()
  ]
  after = [r for r in records if r['time'] > last['time']]
  assert after[0]['updates'] >= updates
  assert after[-1]['frames'] >= last['frames'] + 20_000
  assert after[-1]['wall_seconds'] > last['wall_seconds']
  assert after[-1]['unrolls_duplicated'] == 0


@pytest.mark.parametrize('transport', ['local', transports.BETWEEN_PROCESSES])
def test_sigterm_leaves_a_checkpoint(tmp_path, transport):
  run_dir = tmp_path / 'run'
  process = _start(run_dir, f'--transport={transport}', '--total_frames=1e9')
  _wait_for(lambda: _updates(run_dir) > 5, process)
  process.send_signal(signal.SIGTERM)
  output = _finish(process)
  assert process.returncode == 0, output
  last = json.loads((run_dir / 'metrics.jsonl').read_text().splitlines()[-1])
  saved = checkpointing.read(checkpointing.paths(run_dir / 'checkpoints')[-1])
  assert saved['metadata']['updates'] == last['updates']


def test_a_killed_actor_and_a_killed_learner_are_replaced(tmp_path):
  run_dir = tmp_path / 'run'
  process = _start(
    run_dir, f'--transport={transports.BETWEEN_PROCESSES}', '--total_frames=1e9'
  )
  _wait_for(lambda: _updates(run_dir) > 5, process)
  actor = _role(process, 'actor')
  actor.kill()
  _wait_for(lambda: _replaced(process, 'actor', actor), process)
  before = _updates(run_dir)
  _wait_for(lambda: _updates(run_dir) > before + 50, process)
  last = json.loads((run_dir / 'metrics.jsonl').read_text().splitlines()[-1])
  assert last['unrolls_duplicated'] == 0
  checkpoints = run_dir / 'checkpoints'
  _wait_for(lambda: checkpointing.paths(checkpoints), process)
  learner, actor = _role(process, 'learner'), _role(process, 'actor')
  learner.kill()
  _wait_for(lambda: _replaced(process, 'learner', learner), process)
  # From its checkpoint, and the actor has kept its environments.
  log = run_dir / 'logs' / 'learner.log'
  _wait_for(lambda: 'goes on from' in log.read_text(), process)
  before = _updates(run_dir)
  _wait_for(lambda: _updates(run_dir) > before + 50, process)
  assert actor.is_running()
  children = _descendants(process)
  process.send_signal(signal.SIGINT)
  output = _finish(process)
  assert process.returncode == 0, output
  assert 'learner restarted 1x' in output
  assert 'Traceback' not in output
  assert not [c for c in children if c.is_running() and c.status() != 'zombie']


def test_children_do_not_outlive_a_killed_launcher(tmp_path):
  run_dir = tmp_path / 'run'
  process = _start(
    run_dir, f'--transport={transports.BETWEEN_PROCESSES}', '--total_frames=1e9'
  )
  _wait_for(lambda: _updates(run_dir) > 5, process)
  children = _descendants(process)
  process.kill()
  process.communicate()
  _, alive = psutil.wait_procs(children, timeout=60)
  for child in alive:
    child.kill()
  assert not alive


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--game=breakou'], 'breakout'),
    (['--set=loss.discont=0.9'], 'did you mean loss.discount'),
    (['--config=pongo'], 'did you mean pong'),
    (['--set=learner.batch_size=0', '--set=network.torso=big'], '2 impossible'),
    (['--resume', '--run_dir=/nonexistent/run'], 'no run in'),
    (['--set=environment.suite=nowhere'], 'nowhere'),
  ],
)
def test_mistakes_get_one_clear_message_and_no_traceback(tmp_path, flags, words):
  if '--resume' not in flags:
    flags = [*flags, f'--run_dir={tmp_path}/run']
  done = subprocess.run(
    _command(*flags), capture_output=True, text=True, timeout=60, check=False
  )
  assert done.returncode == 2
  assert words in done.stderr
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'run').exists()


def test_an_existing_run_is_not_overwritten(tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  done = subprocess.run(
    _command('--config=catch', f'--run_dir={tmp_path}'),
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.returncode == 2
  assert '--resume' in done.stderr
