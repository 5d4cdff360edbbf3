"""Engines that die, hang or err, and processes that are killed: with real ones."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import psutil
import pytest

from impala_jax.environments import base
from impala_jax.environments.engines import link as engine_link
from tests.environments.engines import failing_engines as engines
from tests.environments.engines.failing_engines import act

ROOT = pathlib.Path(__file__).parents[3]


def play_until(pool, done, limit=60.0):
  """Plays with action 0 until `done(ready)` is true; that `Ready`, already acted on."""
  end = time.monotonic() + limit
  while time.monotonic() < end:
    try:
      ready = pool.recv(1.0)
    except TimeoutError:
      continue
    act(pool, ready.env_ids)
    if done(ready):
      return ready
  raise AssertionError(f'nothing of the kind in {limit} s: {pool.stats()}')


def start(pool, seed=0):
  """Plays until every environment had a time step."""
  seen = set()
  pool.reset(seed)
  play_until(pool, lambda r: seen.update(r.env_ids) or len(seen) == pool.num_envs)


def observation(ready, env_id):
  return ready.timestep.observation[ready.env_ids.tolist().index(env_id)].tolist()


def eventually(condition, limit=30.0):
  end = time.monotonic() + limit
  while not (held := condition()) and time.monotonic() < end:
    time.sleep(0.02)
  return held


def runs(pid):
  """Whether the process is there and no zombie."""
  try:
    return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
  except psutil.NoSuchProcess:
    return False


def below_keeper(pool):
  """All processes under the pool's keeper."""
  return psutil.Process(pool._link._keeper.pid).children(recursive=True)


def shared_memory(pid=None):
  """Names of the `messy` engines of a pool in process `pid`, default this one."""
  prefix = engines.shared_prefix(pid or os.getpid())
  return [x for x in os.listdir('/dev/shm') if x.startswith(prefix)]


FAILURES = [
  ('abort', 'signal',
   r'was ended by SIGABRT \(step\); its last output: about to abort \| Lua error'),
  ('exit', 'exit', r'its process ended with exit code 1 \(step\)$'),
  ('sys_exit', 'exception', r'SystemExit: 3 .*\(step\)$'),
  ('exception', 'exception',
   r'RuntimeError: the level is broken \(failing_engines.py:\d+\) \(step\)$'),
  ('segfault', 'signal', r'was ended by SIGSEGV \(step\)$'),
  ('kill', 'signal', r'was ended by SIGKILL \(step\)$'),
  ('hang', 'timeout', r'no answer in 1 s \(step\)$'),
  ('nan', 'output', r'reward is nan: must be one number'),
  ('text', 'output', r"reward is '3': must be one number"),
  ('none', 'output', r'reward is None: must be one number'),
  ('discount', 'output', r'discount is 2.0: must be one number in \[0, 1\]'),
  ('shape', 'output', r"'observation' has shape \[4\] .* spec says \[3\]"),
  ('dtype', 'output', r'dtype float32: its spec says \[3\] and int32'),
  ('order', 'output', r'step type is 0: must be MID or LAST'),
]  # fmt: skip


@pytest.mark.parametrize(('how', 'kind', 'text'), FAILURES)
def test_a_failure_in_step(make, tmp_path, how, kind, text):
  """The first engine fails in its second step; the second one plays on."""
  once = str(tmp_path / 'once')
  failing = engines.spec('failing', 'the level', how=how, once=once, lengths=(3,))
  pool = make([failing], step_timeout=1.0)
  pool.reset(7)
  ready = play_until(pool, lambda r: r.restarted)
  (failure,) = ready.failures
  assert (failure.env_id, failure.task_id) == (0, 0)
  seeds = r'the level \(environment 0, seed \d+, episode seed 100\): '
  assert re.match(seeds, failure.cause), failure.cause
  assert re.search(text, failure.cause), failure.cause
  assert '\n' not in failure.cause
  assert ready.timestep.step_type.tolist() == [0]
  stats = pool.stats()
  assert (stats['failures'], stats['restarts']) == ({kind: 1}, 1)
  # Nothing of the broken episode is in the next one.
  ready = play_until(pool, lambda r: r.episodes or r.restarted)
  assert not ready.restarted
  assert ready.episodes == [(0, 6.0, 3, False, 0)]


@pytest.mark.parametrize(
  'how', ['abort', 'exit', 'exception', 'hang', 'order', 'segfault']
)
def test_a_failure_in_reset(make, tmp_path, how):
  once = str(tmp_path / 'once')
  failing = engines.spec('failing', how=how, at=(1, 0), once=once, lengths=(2,))
  pool = make([failing], reset_timeout=5.0)
  pool.reset(0)
  ready = play_until(pool, lambda r: r.restarted)
  (failure,) = ready.failures
  assert '(reset)' in failure.cause
  assert ('no answer in 5 s' in failure.cause) == (how == 'hang')
  # Where the environment did not tell, the last known seed would be the wrong one.
  assert ('episode seed 101' in failure.cause) == (how != 'segfault')
  assert 'episode seed 100' not in failure.cause


@pytest.mark.parametrize('how', ['abort', 'exit', 'exception', 'hang'])
def test_a_failure_at_the_start(make, tmp_path, how):
  once = str(tmp_path / 'once')
  failing = engines.spec('failing_to_start', 'the level', how=how, once=once)
  pool = make([failing], reset_timeout=5.0)
  pool.reset(0)
  ready = play_until(pool, lambda r: True)
  assert list(ready.restarted) == [0]
  (failure,) = ready.failures
  assert re.match(r'the level \(environment 0, seed \d+\): .*\(start\)', failure.cause)


@pytest.mark.parametrize(
  ('maker', 'text'),
  [
    ('refused', r"^the level \(.*\): ValueError: level is 'nowhere'.* \(start\)$"),
    ('missing', r"AttributeError: .* has no attribute 'missing'"),
    ('count', r'TypeError: .* unexpected keyword argument'),
  ],
)
def test_mistakes_are_told_at_once(make, maker, text):
  kwargs = {'wrong': 1} if maker == 'count' else {}
  pool = make([engines.spec(maker, 'the level', **kwargs)])
  pool.reset(0)
  for _ in range(2):
    with pytest.raises(base.EngineError, match=text):
      pool.recv(60.0)
  assert pool.stats()['restarts'] == 0


def test_a_step_that_computes_has_the_time_of_a_reset(make):
  """Some levels compile a map in mid-episode, on a machine that is full."""
  pool = make([engines.spec('failing', how='compute', lengths=(3,))], step_timeout=2.0)
  pool.reset(0)
  ready = play_until(pool, lambda r: r.episodes or r.failures)
  assert not ready.failures
  assert ready.episodes[0].length == 3


def test_a_step_that_computes_for_ever_is_ended(make, tmp_path):
  once = str(tmp_path / 'once')
  pool = make(
    [engines.spec('failing', how='spin', once=once, lengths=(3,))], step_timeout=2.0
  )
  start(pool)
  pool._reset_timeout = 4.0  # Which an engine may need to start.
  (failure,) = play_until(pool, lambda r: r.failures).failures
  assert 'no answer in 4 s (step)' in failure.cause


def with_others(*makers, **settings):
  """Engines by task, and the settings of a pool of one environment for each."""
  made = [engines.spec(*maker[:2], **maker[2]) for maker in makers]
  return made, {'others': dict(enumerate(made)), **settings}


FAILING = ('failing', 'broken', {'how': 'exception', 'at': (0, 1), 'lengths': (3,)})


def test_an_environment_whose_level_keeps_failing_plays_another(make):
  counts = [('count', f'level {i}', {'env_id': i}) for i in (1, 2)]
  made, settings = with_others(FAILING, *counts, max_restarts=1)
  pool = make(made, **settings)
  tasks = pool.task_ids
  pool.reset(0)
  failures, ready = [], None
  while not failures or not failures[-1].given_up:
    ready = play_until(pool, lambda r: r.failures)
    failures += ready.failures
  assert [(f.env_id, f.task_id, f.given_up) for f in failures] == [
    (0, 0, False),
    (0, 0, True),
  ]
  assert 'of which 1 are allowed' in failures[-1].cause
  instead = failures[-1].instead
  assert instead in (1, 2)
  if 0 not in ready.restarted:
    ready = play_until(pool, lambda r: 0 in r.restarted)
  assert observation(ready, 0)[0] == instead  # It says who it is.
  assert tasks.tolist() == [instead, 1, 2]
  ended = play_until(pool, lambda r: any(e.env_id == 0 for e in r.episodes))
  (episode,) = [e for e in ended.episodes if e.env_id == 0]
  assert episode.task_id == instead
  assert pool.stats()['given_up'] == 0


def test_an_environment_without_another_level_is_given_up(make):
  """The others of the same level go on, and do not wait for it."""
  made, settings = with_others(FAILING, max_restarts=0)
  pool = engines.process_pool.ProcessPool(
    [made[0], *[engines.spec('count', env_id=i) for i in (1, 2)]],
    [0, 0, 0],
    engines.COUNTING,
    close_timeout=1.0,
    **settings,
  )
  try:
    pool.reset(0)
    (failure,) = play_until(pool, lambda r: r.failures).failures
    assert (failure.env_id, failure.given_up, failure.instead) == (0, True, -1)
    steps = np.zeros(3, int)
    while steps[1:].min() < 20:
      steps[play_until(pool, lambda r: True).env_ids] += 1
    assert steps[0] == 0
    stats = pool.stats()
    assert (stats['given_up'], stats['states'][0], stats['pids'][0]) == (
      1,
      'given up',
      0,
    )
  finally:
    pool.close()


@pytest.mark.parametrize(
  ('maker', 'kind'),
  [(FAILING, base.EngineError), (('refused', 'nowhere', {}), base.EngineMistake)],
)
def test_without_any_environment_left_the_pool_ends(make, maker, kind):
  made, settings = with_others(maker, maker, max_restarts=0)
  pool = make(made, **settings)
  pool.reset(0)
  with pytest.raises(base.EngineError, match='no environment is left; the last was'):
    play_until(pool, lambda r: False)
  with pytest.raises(kind):
    pool.recv(1.0)


def test_what_engines_count_and_warn_of_outlives_them(make, capfd):
  pool = make([engines.spec('caching', lengths=(10**9,)), engines.spec('count')])
  # However long the other engine takes to start, this one is in its first episode.
  start(pool)
  counts = pool.counts()
  assert (counts['cache_hits'], counts['cache_unwritable']) == (2, 1)
  ended = lambda r: [e for e in r.episodes if e.env_id == 1]
  play_until(pool, ended)
  play_until(pool, ended)  # Between the two it began one.
  assert pool.counts()['resets'] >= 1
  assert pool.counts()['reset_seconds'] > 0.0
  os.kill(pool.stats()['pids'][0], signal.SIGKILL)
  play_until(pool, lambda r: 0 in r.restarted)
  assert (pool.counts()['cache_hits'], pool.counts()['cache_unwritable']) == (4, 2)
  # Each engine has warned once, in the log of this process.
  pool.close()
  assert capfd.readouterr().err.count('engine 0 WARNING the cache is read-only') == 2


def test_others_go_on_while_an_engine_is_replaced(make, tmp_path):
  """The new engine's start takes longer than this test."""
  once = str(tmp_path / 'once')
  pool = make(
    [engines.spec('failing_then_stuck', once=once)]
    + [engines.spec('count', env_id=i) for i in (1, 2)]
  )
  pool.reset(0)
  play_until(pool, lambda r: r.failures)
  steps = np.zeros(3, int)
  while steps[1:].min() < 300:
    ready = pool.recv(60.0)
    steps[ready.env_ids] += 1
    act(pool, ready.env_ids)
  assert steps[0] == 0
  assert pool.stats()['states'][0] in ('waits to be restarted', 'starting')


def test_the_budget(make):
  failing = engines.spec('failing', 'the level', how='abort')
  pool = make([engines.spec('count'), failing], max_restarts=2)
  pool.reset(0)
  failures = []
  text = (
    r'the level \(environment 1, .* SIGABRT .*That is failure 3 within 10 minutes, '
    r'of which 2 are allowed'
  )
  with pytest.raises(base.EngineError, match=text):
    play_until(pool, lambda r: failures.extend(r.failures))
  assert [f.env_id for f in failures] == [1, 1]
  assert len({re.search(r'seed (\d+)', f.cause).group(1) for f in failures}) == 2
  assert pool.stats()['restarts'] == 2


def test_no_restart_is_allowed(make):
  pool = make([engines.spec('failing', how='exit')], max_restarts=0)
  pool.reset(0)
  with pytest.raises(base.EngineError, match=r'failure 1 within .* 0 are allowed'):
    play_until(pool, lambda r: False)


def test_the_action_for_a_dead_engine_is_not_given_to_the_next(make):
  pool = make([engines.spec('echo', env_id=i) for i in range(2)])
  pool.reset(0)
  given = set()
  while len(given) < 2:
    given.update(pool.recv(60.0).env_ids.tolist())
  act(pool, [1])
  os.kill(pool.stats()['pids'][0], signal.SIGKILL)
  end = time.monotonic() + 60
  while pool.stats()['states'][0] != 'has a time step':
    assert time.monotonic() < end, pool.stats()
    ready = pool.recv(60.0)
    assert ready.env_ids.tolist() == [1], 'it came again without an action'
    act(pool, [1])
  pool.send(np.array([0]), np.array([3]))
  ready = play_until(pool, lambda r: 0 in r.env_ids)
  assert list(ready.restarted) == [0]
  assert observation(ready, 0) == [0, -1, 0]
  ready = play_until(pool, lambda r: 0 in r.env_ids)
  assert observation(ready, 0) == [0, 0, 1]


def test_engines_are_killed_at_random(make):
  """Whatever is killed whenever, each environment's time steps stay in order."""
  count, kills = 4, 10
  pool = make(
    [engines.spec('count', env_id=i, lengths=(7, 2)) for i in range(count)],
    max_restarts=kills,
    max_ready=3,
  )
  rng = np.random.default_rng(0)
  expected = [(0, 0)] * count  # Episode and step of the next time step.
  failures, killed, missing = [], set(), set()
  pool.reset(0)
  end = time.monotonic() + 120
  while len(failures) < kills or missing:
    assert time.monotonic() < end, pool.stats()
    victim = pool.stats()['pids'][int(rng.integers(count))]
    if rng.random() < 0.02 and victim and victim not in killed and len(killed) < kills:
      killed.add(victim)
      os.kill(victim, signal.SIGKILL)
    try:
      ready = pool.recv(1.0)
    except TimeoutError:
      continue
    failures += ready.failures
    missing.update(f.env_id for f in ready.failures)
    for row, i in enumerate(ready.env_ids.tolist()):
      assert (i in ready.restarted) == (i in missing)
      if i in missing:
        missing.remove(i)
        expected[i] = (0, 0)
      episode, step = expected[i]
      assert ready.timestep.observation[row].tolist() == [i, episode, step]
      length = (7, 2)[episode % 2]
      kind = 0 if step == 0 else 2 if step == length else 1
      assert ready.timestep.step_type[row] == kind
      assert (i in [e.env_id for e in ready.episodes]) == (kind == 2)
      expected[i] = (episode + 1, 0) if kind == 2 else (episode, step + 1)
    act(pool, ready.env_ids)
  assert len(failures) == len(killed) == pool.stats()['restarts'] == kills
  assert all('SIGKILL' in f.cause for f in failures)


def test_an_engine_that_fails_leaves_nothing(make):
  """Its children, files and shared memory go while the pool lives."""
  messy = engines.spec('messy', sessions=(False, True))
  pool = make([messy, engines.spec('messy', env_id=1)])
  start(pool)
  assert len(shared_memory()) == 2
  assert eventually(lambda: len(below_keeper(pool)) == 5)
  before = below_keeper(pool)
  directory = pathlib.Path(pool._link._directory)
  assert (directory / '0.1' / 'tmp' / 'maps' / 'map').exists()
  output = directory / '0.1' / 'output'
  assert eventually(lambda: 'chatters' in output.read_text())
  os.kill(pool.stats()['pids'][0], signal.SIGKILL)
  play_until(pool, lambda r: r.restarted)
  assert eventually(lambda: len(shared_memory()) == 2)
  assert eventually(lambda: sum(runs(p.pid) for p in below_keeper(pool)) == 5)
  after = below_keeper(pool)
  assert len(set(before) & set(after)) == 2
  assert len(after) == 5  # No zombie either.
  folders = lambda: sorted(x.name for x in directory.iterdir() if x.is_dir())
  assert eventually(lambda: folders() == ['0.2', '1.1'])
  pool.close()
  assert not shared_memory()
  assert not directory.exists()
  assert not [p for p in after if runs(p.pid)]


def test_an_engine_that_is_killed_at_its_start_leaves_nothing(make):
  pool = make([engines.spec('messy_and_stuck')])
  pool.reset(0)
  assert eventually(lambda: len(below_keeper(pool)) == 2)
  assert shared_memory()
  children = below_keeper(pool)
  pool.close()
  assert not [p for p in children if runs(p.pid)]
  assert not shared_memory()


def test_output_is_bounded(make):
  pool = make([engines.spec('chatty', lengths=(1,))])
  start(pool)
  output = pathlib.Path(pool._link._directory, '0.1', 'output')
  sizes = []
  for _ in range(20):
    play_until(pool, lambda r: r.timestep.step_type[0] == 0)
    sizes.append(output.stat().st_size)
  assert 0 < max(sizes) < 2 * 2**20  # It wrote 8 MB.


def test_close_is_not_held_up_by_what_hangs(make):
  pool = make([engines.spec('failing', how='hang'), engines.spec('messy')])
  start(pool)
  processes = below_keeper(pool)
  play_until(pool, lambda r: pool.stats()['states'][0] == 'in step')
  pool.close()
  assert not [p for p in processes if runs(p.pid)]
  assert not shared_memory()


def test_the_keeper_is_killed(make):
  pool = make([engines.spec('messy', env_id=i) for i in range(2)])
  start(pool)
  pids = [p.pid for p in below_keeper(pool)]
  assert len(pids) == 4
  os.kill(pool._link._keeper.pid, signal.SIGKILL)
  failures, back = [], set()

  def all_back(ready):
    failures.extend(ready.failures)
    back.update(ready.restarted)
    return len(back) == 2

  play_until(pool, all_back)
  assert all('keeper of the engines ended' in f.cause for f in failures)
  assert eventually(lambda: not any(map(runs, pids)))


@pytest.mark.parametrize('how', ['SIGKILL', 'SIGTERM', 'exit', 'close', 'both'])
def test_the_end_of_the_parent(how):
  """Whatever ends it, nothing is left; `both` kills its keeper with it."""
  what = how if how in ('exit', 'close') else 'wait'
  parent = subprocess.Popen(
    [sys.executable, '-m', f'{engines.MODULE}', what],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    *numbers, directory = parent.stdout.readline().split()
    pids = [int(x) for x in numbers]
    assert len(pids) == 4, 'three engines and their keeper'
    if what == 'wait':
      found = psutil.Process(parent.pid).children(recursive=True)
      assert len(found) == 7, 'two engines have one and two children'
      assert len(shared_memory(parent.pid)) == 2
      pids = [p.pid for p in found]
      signals = {'SIGTERM': signal.SIGTERM}
      if how == 'both':
        os.kill(int(numbers[3]), signal.SIGKILL)
      parent.send_signal(signals.get(how, signal.SIGKILL))
    parent.wait(30)
    if how == 'both':
      # Engines end by themselves; their children only with the next pool.
      engine_pids = [int(x) for x in numbers]
      assert eventually(lambda: not any(map(runs, engine_pids)))
      assert any(map(runs, pids))
      os.utime(directory, (0, 0))
      engines.pool([engines.spec('count')]).close()
    assert eventually(lambda: not any(map(runs, pids))), f'{pids} live'
    assert eventually(lambda: not os.path.exists(directory))
    assert eventually(lambda: not shared_memory(parent.pid))
  finally:
    parent.kill()
    parent.wait()
    parent.stdout.close()


def test_directories_in_use_are_not_swept(make):
  pool = make([engines.spec('count')])
  directory = pool._link._directory
  os.utime(directory, (0, 0))
  young = tempfile.mkdtemp(prefix='impala_engines_')
  make([engines.spec('count')])
  assert os.path.isdir(directory)
  assert os.path.isdir(young), 'it may be about to be locked'
  os.utime(young, (0, 0))
  engine_link._sweep()
  assert not os.path.exists(young)
