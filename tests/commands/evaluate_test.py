"""The command as a user runs it: results, mistakes, failures, Ctrl-C."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from impala_jax import components, configs
from impala_jax import config as config_lib
from impala_jax.commands import evaluate, main
from impala_jax.environments import base, catch
from impala_jax.evaluation import films
from impala_jax.learning import checkpointing

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def make_level(level, seed):
  """A suite of Catch by another name, one level of which has an engine that fails."""
  if level == 'fails':
    raise base.EngineError('level fails, seed 7: killed by SIGABRT')
  return catch.Catch(seed=seed)


def _settings():
  """The user's own environment, not that of the tests."""
  return {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}


def _run(*flags):
  return subprocess.run(
    [sys.executable, '-m', 'impala_jax', 'evaluate', *flags],
    cwd=_ROOT,
    env=_settings(),
    capture_output=True,
    text=True,
    timeout=200,
    check=False,
  )


def _make_run(run_dir, updates=(3, 7), **environment):
  config = configs.get('catch')
  if environment:
    settings = config_lib.Environment(**environment)
    config = config_lib.Config(
      environment=settings,
      network=config_lib.Network(torso='mlp', hidden=4, frame_stack=1),
    )
  parts = components.build(config)
  for n in updates:
    params = jax.tree.map(np.asarray, parts.agent.init(jax.random.key(n)))
    metadata = {'updates': n, 'frames': 10 * n, 'config': config_lib.to_dict(config)}
    checkpointing.save(run_dir / 'checkpoints', n, {'params': params}, metadata)
  (run_dir / 'config.json').write_text('{}')
  return run_dir


def _report(output):
  return json.loads((output / 'evaluation.json').read_text())


def test_the_newest_checkpoint_of_a_run(tmp_path):
  run_dir = _make_run(tmp_path)
  with_film = importlib.util.find_spec('imageio_ffmpeg') is not None
  done = _run(f'--run_dir={run_dir}', '--episodes=6', '--seed=5',
              *(['--videos'] if with_film else []))  # fmt: skip
  assert done.returncode == 0, done.stderr
  (output,) = (run_dir / 'evaluations').iterdir()
  report = _report(output)
  assert report['complete']
  assert report['checkpoint']['updates'] == 7
  assert (report['seed'], report['episodes'], report['greedy']) == (5, 6, False)
  level = report['levels']['catch']
  assert level['episodes'] == len(level['returns']) == 6
  assert level['mean'] == pytest.approx(np.mean(level['returns']))
  assert f'{level["mean"]:.2f}' in done.stdout
  assert (output / 'evaluation.png').read_bytes()[:4] == b'\x89PNG'
  assert (output / 'evaluation_catch.mp4').exists() == with_film
  assert 'Traceback' not in done.stderr
  assert 'fork' not in done.stderr


def test_a_checkpoint_without_its_run(tmp_path):
  (tmp_path / 'run').mkdir()
  run_dir = _make_run(tmp_path / 'run')
  file = checkpointing.paths(run_dir / 'checkpoints')[0].rename(tmp_path / 'x.msgpack')
  done = _run(
    f'--checkpoint={file}', '--episodes=2', '--greedy', f'--output={tmp_path}/out'
  )
  assert done.returncode == 0, done.stderr
  report = _report(tmp_path / 'out')
  assert report['checkpoint']['updates'] == 3
  assert report['greedy']


def test_a_level_that_fails(tmp_path):
  run_dir = _make_run(
    tmp_path, suite=f'{__name__}:make_level', levels=('a', 'fails', 'b')
  )
  done = _run(f'--run_dir={run_dir}', '--episodes=3', f'--output={tmp_path}/out')
  assert done.returncode == 1
  report = _report(tmp_path / 'out')
  assert not report['complete']
  levels = report['levels']
  assert [levels[x]['complete'] for x in ('a', 'fails', 'b')] == [True, False, True]
  assert 'killed by SIGABRT' in levels['fails']['error']
  assert 'FAILED: EngineError: level fails' in done.stdout
  assert 'Traceback' not in done.stderr
  # Levels that are not asked for need not work.
  done = _run(
    f'--run_dir={run_dir}', '--episodes=3', '--levels=b,a', f'--output={tmp_path}/some'
  )
  assert done.returncode == 0, done.stderr
  assert list(_report(tmp_path / 'some')['levels']) == ['b', 'a']


def test_interrupt_leaves_what_there_is(tmp_path):
  run_dir = _make_run(tmp_path)
  process = subprocess.Popen(
    [
      sys.executable,
      '-m',
      'impala_jax',
      'evaluate',
      f'--run_dir={run_dir}',
      '--episodes=1000000',
      f'--output={tmp_path}/out',
    ],
    cwd=_ROOT,
    env=_settings(),
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  for line in process.stdout:
    if 'of 1000000 episodes, about' in line:
      break
  process.send_signal(signal.SIGINT)
  output, errors = process.communicate(timeout=100)
  assert process.returncode == 130, errors
  assert 'incomplete' in errors
  report = _report(tmp_path / 'out')
  assert not report['complete']
  level = report['levels']['catch']
  assert 0 < level['episodes'] < level['planned_episodes'] == 1_000_000
  assert f'only {level["episodes"]} of 1000000' in output
  assert (tmp_path / 'out' / 'evaluation.png').exists()


# Runs the command once for each list of flags, in one process.
_MANY = """
import contextlib, io, json, sys
from impala_jax.commands import main
found = []
for case in json.loads(sys.argv[1]):
  errors = io.StringIO()
  with contextlib.redirect_stderr(errors):
    code = main.main(['evaluate', *case])
  found.append([code, errors.getvalue()])
print(json.dumps(found))
"""


def test_mistakes_get_one_clear_line(tmp_path):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'empty' / 'config.json').write_text('{}')
  (tmp_path / 'damaged' / 'checkpoints').mkdir(parents=True)
  (tmp_path / 'damaged' / 'config.json').write_text('{}')
  damaged = tmp_path / 'damaged' / 'checkpoints' / 'checkpoint_0000000004.msgpack'
  damaged.write_bytes(b'half a file')
  (tmp_path / 'good').mkdir()
  run = f'--run_dir={_make_run(tmp_path / "good")}'
  (tmp_path / 'old').mkdir()
  (tmp_path / 'old' / 'evaluation.json').write_text('{}')
  cases = {
    (): '--run_dir is missing',
    (f'--run_dir={tmp_path}/nowhere',): 'there is no run',
    (f'--run_dir={tmp_path}/empty',): 'holds no sound checkpoint',
    (f'--run_dir={tmp_path}/damaged',): 'holds no sound checkpoint; 1 damaged',
    (run, '--checkpoint=5'): '--checkpoint=5: there are 3, 7',
    (f'--checkpoint={damaged}',): 'is not a checkpoint',
    (run, '--levels=catch,pong'): '--levels=pong: the levels of this run are catch',
    (run, '--episodes=0'): '--episodes=0: must be at least 1',
    (run, '--processes=-2'): '--processes=-2: must be at least 1',
    (run, '--seed=-1'): '--seed=-1: must be at least 0',
    (run, '--episodes=many'): '--episodes=many',
    (run, '--episods=5'): "'episods'",
    (run, 'more'): "unknown arguments ['more']",
    (run, f'--output={tmp_path}/old'): 'holds an evaluation already',
    (run, f'--output={damaged}/x'): 'cannot write',
    (run, '--set=network.hidden=7'): 'is of another network',
    (run, '--set=network.hiden=7'): 'did you mean network.hidden',
    (run, '--set=environment.suite=nowhere'): "'nowhere'",
  }
  done = subprocess.run(
    [sys.executable, '-c', _MANY, json.dumps(list(cases))],
    cwd=_ROOT,
    env=_settings(),
    capture_output=True,
    text=True,
    timeout=200,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  for (flags, words), (code, errors) in zip(cases.items(), found, strict=True):
    assert code == 2, (flags, errors)
    assert words in errors, flags
    # One for the warning that a checkpoint is damaged.
    assert len(errors.splitlines()) <= 2, (flags, errors)
    assert 'Traceback' not in errors
  assert not (tmp_path / 'good' / 'evaluations').exists()


def test_films_that_were_cut_short_leave_a_whole_evaluation(
  tmp_path, monkeypatch, capsys
):
  """The chart is drawn before the films, which take longest."""
  run_dir, out = _make_run(tmp_path / 'run'), tmp_path / 'out'
  drawn = []

  def film(*_, should_stop, **__):
    drawn.append((out / 'evaluation.png').exists())
    os.kill(os.getpid(), signal.SIGINT)
    deadline = time.monotonic() + 60
    while not should_stop() and time.monotonic() < deadline:
      time.sleep(0.01)

  monkeypatch.setattr(films, 'film', film)
  monkeypatch.setattr(evaluate, '_check_flags', lambda args: None)
  # What it sets for its whole process.
  monkeypatch.setattr(evaluate.compile_cache, 'enable', lambda: None)
  monkeypatch.setattr(evaluate.logging, 'set_verbosity', lambda level: None)
  before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
  try:
    code = main.main(
      [
        'evaluate',
        f'--run_dir={run_dir}',
        '--episodes=2',
        '--videos',
        f'--output={out}',
      ]
    )
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  assert code == 130
  assert drawn == [True]
  assert 'Stopped early: films are missing.' in capsys.readouterr().err
  assert _report(out)['complete']
