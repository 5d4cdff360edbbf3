"""The tool that fills the level cache, as a process, over the fake engine."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from impala_jax import config as config_lib
from impala_jax.environments.dmlab import environment as dmlab
from impala_jax.environments.dmlab import (
  level_cache,
  level_cache_filler,
)
from impala_jax.environments.dmlab import suite as dmlab_suite
from tests import fake_deepmind_lab as fake

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def engine(monkeypatch, tmp_path):
  fake.install(monkeypatch)
  # Where a test that forgets to name a cache would put one.
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'user'))
  (tmp_path / 'tmp').mkdir()
  monkeypatch.setenv('TMPDIR', str(tmp_path / 'tmp'))


def command(tmp_path, *flags):
  return [
    sys.executable,
    *('-m', 'impala_jax', 'fill_level_cache'),
    f'--level_cache={tmp_path / "cache"}',
    f'--report={tmp_path / "report.json"}',
    '--processes=2',
    *flags,
  ]


def run(tmp_path, *flags):
  """Returns (exit status, stdout, stderr, report or None)."""
  report = tmp_path / 'report.json'
  report.unlink(missing_ok=True)
  result = subprocess.run(
    command(tmp_path, *flags),
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=200,
  )
  data = json.loads(report.read_text()) if report.exists() else None
  return result.returncode, result.stdout, result.stderr, data


def test_fill_then_train(tmp_path):
  levels = 'explore_goal_locations_small,rooms_watermaze'
  code, out, err, report = run(tmp_path, f'--levels={levels}', '--seeds=4')
  assert (code, err) == (0, '')
  maps, none = (report['levels'][x] for x in levels.split(','))
  assert (maps['episodes'], maps['maps_compiled'], maps['maps_kept']) == (4, 4, 4)
  assert (maps['hits'], maps['hit_rate'], maps['failures']) == (0, 0.0, [])
  # A level that compiles nothing is not begun over and over.
  assert none['episodes'] + none['skipped'] == 4
  assert (none['maps_compiled'], none['hit_rate']) == (0, None)
  assert report['total']['maps_compiled'] == 4
  assert 'no maps' in out
  assert '4 maps compiled, 0 were there' in out
  # The same again finds all.
  code, _, _, report = run(tmp_path, f'--levels={levels}', '--seeds=4')
  assert code == 0
  assert (report['total']['maps_compiled'], report['total']['hits']) == (0, 4)
  assert report['total']['hit_rate'] == 1.0
  # And so does a run that draws its episodes from these seeds.
  environment = dmlab.make(
    'explore_goal_locations_small',
    3,
    level_cache=tmp_path / 'cache',
    episode_seeds=4,
    width=16,
    height=12,
  )
  for _ in range(10):
    environment.reset()
  assert environment.level_cache.stats() == level_cache.Stats(hits=10)
  total = level_cache.summary(tmp_path / 'cache')['explore_goal_locations_small']
  assert (total.hits, total.misses, total.writes) == (14, 4, 4)
  assert not list((tmp_path / 'tmp').iterdir())


def test_failures_are_reported_and_do_not_stop_it(tmp_path):
  levels = ['fake/maps', 'fake/exit_at_reset_1', 'fake/hang_at_reset_1']
  code, out, _, report = run(
    tmp_path, f'--levels={",".join(levels)}', '--seeds=4', '--timeout=3'
  )
  assert code == 0
  maps, dead, hung = (report['levels'][x] for x in levels)
  assert (maps['maps_compiled'], maps['failures']) == (4, [])
  # Those that always fail are given up.
  for broken in (dead, hung):
    assert broken['episodes'] == 0
    assert 3 <= len(broken['failures']) <= 4
    assert len(broken['failures']) + broken['skipped'] == 4
  assert 'exit code 1' in dead['failures'][0]
  assert "Couldn't load maps/missing.bsp" in dead['failures'][0]
  assert 'fake/exit_at_reset_1, seed ' in dead['failures'][0]
  assert 'no answer in 3 s' in hung['failures'][0]
  assert 'failed: fake/exit_at_reset_1' in out
  assert not list((tmp_path / 'tmp').iterdir())


def test_nothing_filled_is_an_error(tmp_path):
  code, out, _, report = run(tmp_path, '--levels=fake/abort_at_reset_1', '--seeds=2')
  assert code == 1
  assert len(report['total']['failures']) == 2
  assert 'SIGABRT' in out


def test_a_level_without_maps_is_no_error(tmp_path):
  code, _, _, report = run(tmp_path, '--levels=lt_chasm', '--seeds=1')
  assert code == 0
  assert report['total']['episodes'] == 1


def test_a_cache_too_small(tmp_path):
  code, out, _, report = run(
    tmp_path, '--levels=fake/maps', '--seeds=12', '--level_cache_gib=3e-6'
  )
  assert code == 0
  assert report['total']['evictions'] > 0
  assert 'Raise --level_cache_gib' in out


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--levels=rooms_watermase'], 'did you mean rooms_watermaze'),
    (['--levels=rooms_collect_good_objects_test'], 'held out for evaluation'),
    (['--levels=dmlab30'], 'Brady'),
    (['--levels=lt_chasm', '--level_cache_gib=0'], '--level_cache_gib=0.0'),
    (['--levels=lt_chasm', '--timeout=0'], '--timeout=0.0: must be above 0'),
    (['--levels=lt_chasm', '--level_cache=/dev/null/cache'], 'cannot be written'),
    (['lt_chasm'], "unknown arguments ['lt_chasm']"),
  ],
)
def test_mistakes(tmp_path, flags, words):
  code, out, err, report = run(tmp_path, *flags)
  assert (code, out, report) == (2, '', None)
  assert words in err


def test_without_the_engine(tmp_path, monkeypatch):
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  have = [sys.executable, '-c', 'import deepmind_lab']
  if subprocess.run(have, capture_output=True, check=False).returncode == 0:
    pytest.skip('DeepMind Lab is installed here')
  code, out, err, _ = run(tmp_path, '--levels=dmlab30')
  assert (code, out) == (2, '')
  assert 'docs/users/build.md' in err


def test_stopped_by_a_signal(tmp_path):
  """Engines are ended, and the report says what was done."""
  process = subprocess.Popen(
    command(tmp_path, '--levels=fake/maps,fake/hang_at_reset_1', '--seeds=2'),
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    deadline = time.monotonic() + 60
    cache = tmp_path / 'cache' / 'maps'
    while len(list(cache.rglob('*.map'))) < 2 and time.monotonic() < deadline:
      time.sleep(0.1)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
  finally:
    process.kill()
    process.wait()
  assert process.returncode == 1, err
  assert 'the same command goes on from here' in err
  assert '2 maps compiled' in out
  report = json.loads((tmp_path / 'report.json').read_text())
  assert report['total']['maps_compiled'] == 2
  assert not list((tmp_path / 'tmp').iterdir())
  assert not _processes_of(tmp_path)


def _processes_of(tmp_path):
  found = []
  for entry in pathlib.Path('/proc').iterdir():
    if entry.name.isdigit() and int(entry.name) != os.getpid():
      try:
        environment = (entry / 'environ').read_bytes()
      except OSError:
        continue
      if f'TMPDIR={tmp_path}'.encode() in environment:
        found.append(entry.name)
  return found


def test_progress_is_told_as_it_goes(tmp_path):
  seen = []
  config = config_lib.Config(
    environment=config_lib.Environment(suite='dmlab', levels=('fake/maps',)),
    suite_settings=dmlab_suite.Settings(level_cache=str(tmp_path / 'cache')),
  )
  reports = level_cache_filler.fill(
    config,
    seeds=3,
    processes=1,
    on_job=lambda now: seen.append(now['fake/maps'].done),
  )
  assert seen == sorted(seen)
  assert set(seen) >= {1, 2, 3}
  assert reports['fake/maps'].stats == level_cache.Stats(misses=3, writes=3)
