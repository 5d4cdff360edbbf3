"""Makers of environments that fail in every way that an engine can.

`process_pool` imports them by name in its engines' processes.
"""

import logging
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
from dm_env import specs

from impala_jax import types
from impala_jax.environments import catch
from impala_jax.environments.engines import pool as process_pool
from tests import counting

MODULE = 'tests.environments.engines.failing_engines'
COUNTING = types.EnvironmentSpec(types.ArraySpec((3,), np.dtype(np.int32)), 4)


def count(seed=0, **kwargs):
  """The environment that counts; its seed does nothing."""
  del seed
  return counting.CountingEnvironment(**kwargs)


def _exit():
  os._exit(1)


def _raise():
  raise RuntimeError('the level\nis   broken')


def _grind():
  """Neither sleeps nor answers; no signal handler of Python's runs meanwhile."""
  signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
  time.sleep(3600)


def _leave_core():
  print('about to abort', file=sys.stderr)
  os.write(1, b'Lua error: no such map\n\n')
  os.abort()


def _compute(seconds):
  """Of this process's own time, however little it gets of the machine."""
  end = time.process_time() + seconds
  while time.process_time() < end:
    pass


HOW = {
  'compute': lambda: _compute(3.0),
  'spin': lambda: _compute(1e9),
  'abort': _leave_core,
  'exit': _exit,
  'sys_exit': lambda: sys.exit(3),
  'exception': _raise,
  'segfault': lambda: os.kill(os.getpid(), signal.SIGSEGV),
  'kill': lambda: os.kill(os.getpid(), signal.SIGKILL),
  'hang': _grind,
}


class _Failing(counting.CountingEnvironment):
  """Fails at one step; with `once`, a path, only the first of all processes does.

  Its episodes have the seeds 100, 101, ...
  """

  def __init__(self, how, at, once, **kwargs):
    super().__init__(**kwargs)
    self.on_episode_seed = lambda seed: None
    self._how = how
    self._at = tuple(at)  # Episode and step; step 0 is the reset.
    self._once = once

  @property
  def episode_seed(self):
    return 100 + self._episode

  def reset(self):
    step = super().reset()
    if self._how != 'segfault':  # Then nobody knows it.
      self.on_episode_seed(self.episode_seed)
    return self._perhaps(step)

  def step(self, action):
    return self._perhaps(super().step(action))

  def _perhaps(self, step):
    if (self._episode, self._step) != self._at or _is_done(self._once):
      return step
    if self._how in HOW:
      HOW[self._how]()
    return {
      'nan': step._replace(reward=float('nan')),
      'text': step._replace(reward='3'),
      'none': step._replace(reward=None),
      'discount': step._replace(discount=2.0),
      'shape': step._replace(observation=np.zeros(4, np.int32)),
      'dtype': step._replace(observation=np.zeros(3, np.float32)),
      'order': step._replace(step_type=1 if step.first() else 0),
    }.get(self._how, step)


def _is_done(once):
  """Whether another process was first to get here with the same path."""
  if not once:
    return False
  try:
    pathlib.Path(once).touch(exist_ok=False)
  except FileExistsError:
    return True
  return False


def failing(seed, how, at=(0, 2), once='', **kwargs):
  """Fails in `how` when it reaches `at`, (episode, step)."""
  del seed
  return _Failing(how, at, once, **kwargs)


def failing_to_start(seed, how, once='', **kwargs):
  """Fails in its maker."""
  if not _is_done(once):
    HOW[how]()
  return count(seed, **kwargs)


def failing_then_stuck(seed, once):
  """The first process aborts in its second step, the others do not even start."""
  del seed
  if pathlib.Path(once).exists():
    time.sleep(3600)
  return _Failing('abort', (0, 2), once)


def refused(seed):
  del seed
  raise ValueError("level is 'nowhere': must be one of here, there")


class _SlowReset(counting.CountingEnvironment):
  def __init__(self, seconds, once, **kwargs):
    super().__init__(**kwargs)
    self._seconds = seconds
    self._once = once

  def reset(self):
    if self._episode >= 0 and not _is_done(self._once):
      time.sleep(self._seconds)
    return super().reset()


def slow_to_reset(seed, seconds, once='', **kwargs):
  """Takes `seconds` for its second episode's reset."""
  del seed
  return _SlowReset(seconds, once, **kwargs)


class _SlowStep(counting.CountingEnvironment):
  def __init__(self, seconds, **kwargs):
    super().__init__(**kwargs)
    self._seconds = seconds

  def step(self, action):
    if self._step == 1:
      time.sleep(self._seconds)
    return super().step(action)


def slow_to_step(seed, seconds, **kwargs):
  """Takes `seconds` for the second step of each episode."""
  del seed
  return _SlowStep(seconds, **kwargs)


def seeded(seed):
  """Catch, whose balls tell the seed."""
  return catch.Catch(seed=seed)


class _Told(counting.CountingEnvironment):
  """Its observation is the seed that its maker got."""

  def __init__(self, seed):
    super().__init__(lengths=(2,))
    self._seed = seed

  def _observation(self):
    return np.array([self._seed, self._episode, self._step], np.int32)


def told(seed):
  return _Told(seed)


class _Messy(counting.CountingEnvironment):
  """As an engine with a process, files and shared memory of its own."""

  def __init__(self, shared, sessions, **kwargs):
    super().__init__(**kwargs)
    pathlib.Path(tempfile.gettempdir(), 'maps').mkdir()
    pathlib.Path(tempfile.gettempdir(), 'maps', 'map').write_text('map')
    print('engine', os.getpid(), 'chatters', flush=True)
    name = f'/dev/shm/{shared}{os.getpid()}'
    with open(name, 'wb+') as f:
      f.truncate(4096)
      self._memory = np.memmap(f, np.uint8)
    sleep = [sys.executable, '-S', '-c', 'import time; time.sleep(3600)']
    self.children = [subprocess.Popen(sleep, start_new_session=own) for own in sessions]


class _Chatty(counting.CountingEnvironment):
  def reset(self):
    print('x' * 400_000, flush=True)
    return super().reset()


def chatty(seed, **kwargs):
  """Prints 0.4 MB in each reset."""
  del seed
  return _Chatty(**kwargs)


class _Mixed(counting.CountingEnvironment):
  def reset(self):
    return super().reset()._replace(observation=self._both())

  def step(self, action):
    return super().step(action)._replace(observation=self._both())

  def observation_spec(self):
    return {
      'frame': specs.Array((2, 4, 3), np.uint8),
      'count': specs.Array((), np.int64),
    }

  def _both(self):
    return {
      'frame': np.full((2, 4, 3), self._step, np.uint8),
      'count': np.int64(self._episode),
    }


def messy(seed, shared, sessions=(False,), **kwargs):
  """Has a child for each of `sessions`: whether in a session of its own.

  The name of its shared memory begins with `shared`.
  """
  del seed
  return _Messy(shared, sessions, **kwargs)


def messy_and_stuck(seed, shared):
  """Never returns what it has made."""
  made = messy(seed, shared)
  time.sleep(3600)
  return made


class _Echo(counting.CountingEnvironment):
  """Its observation holds the action before it, in place of the episode."""

  _action = -1

  def step(self, action):
    self._action = int(action)
    return super().step(action)

  def _observation(self):
    return np.array([self._env_id, self._action, self._step], np.int32)


def echo(seed, **kwargs):
  del seed
  return _Echo(**kwargs)


class _Caching(counting.CountingEnvironment):
  """Counts what happened to a cache, and warns of it at every reset."""

  def reset(self):
    logging.getLogger('cache').warning('the cache is read-only')
    return super().reset()

  def counts(self):
    return {'cache_hits': 2 * (self._episode + 1), 'cache_unwritable': 1}


def caching(seed, **kwargs):
  del seed
  return _Caching(**kwargs)


def mixed(seed, **kwargs):
  """Observations as of a game with a picture, and one number of 64 bits."""
  del seed
  return _Mixed(**kwargs)


def spec(function, name='counting', **kwargs):
  if function.startswith('messy'):
    kwargs['shared'] = shared_prefix(os.getpid())
  return process_pool.EngineSpec(
    f'{MODULE}:{function}', kwargs, name, (shared_prefix(os.getpid()),)
  )


def shared_prefix(pid):
  """Of the shared memory of `messy` engines whose pool is in process `pid`."""
  return f'ImpalaTest{pid}_'


def pool(engines, observations=COUNTING, **kwargs):
  """A pool with one task for each environment."""
  settings = {'close_timeout': 1.0, **kwargs}
  return process_pool.ProcessPool(
    engines, np.arange(len(engines)), observations, **settings
  )


def act(pool, env_ids, action=0):
  pool.send(np.asarray(env_ids, np.int32), np.full(len(env_ids), action, np.int32))


def make_and_wait(how):
  """The main of a process that a test kills: says when its engines run, then waits."""
  made = pool(
    [
      spec('messy', env_id=0),
      spec('messy', sessions=(False, True)),
      spec('failing', how='hang', at=(0, 1)),
    ]
  )
  made.reset(0)
  seen = set()
  while len(seen) < 3:
    seen.update(made.recv(60.0).env_ids.tolist())
  made.send(np.array([2]), np.array([0]))  # It hangs.
  print(*made.stats()['pids'], made._link._keeper.pid, made._link._directory)
  sys.stdout.flush()
  if how == 'wait':
    time.sleep(3600)
  if how == 'close':
    made.close()
  # Else the process ends with its pool open.


if __name__ == '__main__':
  make_and_wait(sys.argv[1])
