"""What the pool of engine processes costs, and what its engines' troubles cost others.

  python -m experiments.benchmarks.pool_benchmark --envs 4

The engine of (a) and (b) computes for 2 ms of CPU time in each step, as DeepMind Lab
does, and gives its observations. Prints one JSON object:

  overhead: environment steps per CPU-second of the whole process tree, over those of
    the same engine stepped bare in one process. Rounds of both take turns.
  slow_reset: steps of the others while one environment is held in a reset of 20 s,
    over those of as many environments alone. Rounds of both take turns.
  kills: engines are killed at random for a while; what was restarted and what is left.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import dm_env
import numpy as np
import psutil
from dm_env import specs

from experiments.benchmarks import measure
from impala_jax import types
from impala_jax.environments import base
from impala_jax.environments.engines import pool as process_pool
from impala_jax.runtime import versions

_SPEC = types.EnvironmentSpec(
  {
    'frame': types.ArraySpec((72, 96, 3), np.dtype(np.uint8)),
    'instruction': types.ArraySpec((16,), np.dtype(np.int32)),
  },
  9,
)
_MAKER = 'experiments.benchmarks.pool_benchmark:make_engine'


class Engine(dm_env.Environment):
  """Computes for `cpu_ms` in each step; its second reset sleeps for `reset_s`."""

  def __init__(self, cpu_ms: float, length: int, reset_s: float):
    self._seconds = cpu_ms / 1e3
    self._length = length
    self._reset_s = reset_s
    self._step = self._episode = 0
    self._frame = np.zeros((72, 96, 3), np.uint8)
    self._instruction = np.zeros(16, np.int32)

  def reset(self) -> dm_env.TimeStep:
    self._episode += 1
    if self._episode == 2 and self._reset_s:
      time.sleep(self._reset_s)
    self._step = 0
    return dm_env.restart(self._observation())

  def step(self, action: int) -> dm_env.TimeStep:
    end = time.thread_time() + self._seconds
    while time.thread_time() < end:
      pass
    self._step += 1
    if self._step == self._length:
      return dm_env.termination(1.0, self._observation())
    return dm_env.transition(0.0, self._observation())

  def observation_spec(self) -> dict[str, specs.Array]:
    observation = _SPEC.observation
    return {k: specs.Array(s.shape, s.dtype, k) for k, s in observation.items()}

  def action_spec(self) -> specs.DiscreteArray:
    return specs.DiscreteArray(_SPEC.num_actions)

  def _observation(self) -> dict[str, np.ndarray]:
    return {'frame': self._frame.copy(), 'instruction': self._instruction.copy()}


def make_engine(
  seed: int, cpu_ms: float, length: int = 10**9, reset_s: float = 0.0
) -> Engine:
  del seed
  return Engine(cpu_ms, length, reset_s)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--envs', type=int, default=4)
  parser.add_argument('--cpu_ms', type=float, default=2.0, help='of a step')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--round_s', type=float, default=3.0)
  parser.add_argument('--kill_s', type=float, default=60.0, help='seconds of kills')
  args = parser.parse_args()
  result = {
    'benchmark': 'pool',
    **vars(args),
    'overhead': _overhead(args),
    'slow_reset': _slow_reset(args),
    'kills': _kills(args),
    'versions': versions.installed(),
  }
  print(json.dumps(result, indent=1))
  return 0


def _pool(kwargs: list[dict[str, Any]], **settings: Any) -> process_pool.ProcessPool:
  engines = [
    process_pool.EngineSpec(_MAKER, k, f'engine {i}') for i, k in enumerate(kwargs)
  ]
  pool = process_pool.ProcessPool(engines, [0] * len(engines), _SPEC, **settings)
  pool.reset(0)
  seen: set[int] = set()

  def all_play(ready: base.Ready) -> bool:
    seen.update(ready.env_ids.tolist())
    return len(seen) == len(engines)

  _play(pool, all_play)
  return pool


def _play(pool: process_pool.ProcessPool, done: Callable[[base.Ready], Any]) -> None:
  while True:
    try:
      ready = pool.recv(1.0)
    except TimeoutError:
      continue
    pool.send(ready.env_ids, np.zeros(len(ready.env_ids), np.int32))
    if done(ready):
      return


def _steps(pool: process_pool.ProcessPool, seconds: float) -> np.ndarray:
  """Time steps of each environment within `seconds`."""
  counts = np.zeros(pool.num_envs, int)
  end = time.monotonic() + seconds

  def done(ready: base.Ready) -> bool:
    counts[ready.env_ids] += 1
    return time.monotonic() > end

  _play(pool, done)
  return counts


def _overhead(args: argparse.Namespace) -> dict[str, Any]:
  pool = _pool([{'cpu_ms': args.cpu_ms}] * args.envs)
  bare = make_engine(0, args.cpu_ms)
  bare.reset()
  rates: dict[str, list[float]] = {'bare': [], 'pool': []}
  own = []
  for _ in range(args.rounds):
    cpu, steps = time.process_time(), 0
    end = time.monotonic() + args.round_s
    while time.monotonic() < end:
      bare.step(0)
      steps += 1
    rates['bare'].append(steps / (time.process_time() - cpu))
    mine, theirs = time.process_time(), _engines_cpu(pool)
    count = int(_steps(pool, args.round_s).sum())
    mine = time.process_time() - mine
    rates['pool'].append(count / (mine + _engines_cpu(pool) - theirs))
    own.append(1e3 * mine / count)
  pool.close()
  ratios = [p / b for p, b in zip(rates['pool'], rates['bare'], strict=True)]
  extra = [1e3 / p - 1e3 / b for p, b in zip(rates['pool'], rates['bare'], strict=True)]
  return {
    'bare_steps_per_cpu_s': measure.spread(rates['bare'], 1),
    'pool_steps_per_cpu_s': measure.spread(rates['pool'], 1),
    'pool_over_bare': measure.spread(ratios),
    'overhead_cpu_ms_per_step': measure.spread(extra),
    'of_that_in_the_pools_own_process': measure.spread(own),
  }


def _engines_cpu(pool: process_pool.ProcessPool) -> float:
  """CPU-seconds of the engines and of their keeper."""
  engine = psutil.Process(pool.stats()['pids'][0])
  keeper = engine.parent()
  assert keeper is not None
  return sum(_cpu_seconds(p.pid) for p in (keeper, *keeper.children(recursive=True)))


def _cpu_seconds(pid: int) -> float:
  # To the nanosecond: psutil's come in hundredths of a second.
  with open(f'/proc/{pid}/schedstat') as f:
    return int(f.read().split()[0]) / 1e9


def _slow_reset(args: argparse.Namespace) -> dict[str, Any]:
  """Two pools take turns of a second: one with an environment held, one without it."""
  others = [{'cpu_ms': args.cpu_ms}] * (args.envs - 1)
  free = _pool(others)
  rates: dict[str, list[float]] = {'held': [], 'free': []}
  for _ in range(3):  # The second reset of an engine is the one that is slow.
    held = _pool([{'cpu_ms': args.cpu_ms, 'length': 1, 'reset_s': 20.0}, *others])
    while held.stats()['states'][0] != 'in reset':
      _steps(held, 0.0)
    for turn in range(8):
      # The order changes, so that a growing load troubles both alike.
      for name in ('held', 'free') if turn % 2 else ('free', 'held'):
        start = time.monotonic()
        counts = _steps(held if name == 'held' else free, 1.0)
        count = counts[1:].sum() if name == 'held' else counts.sum()
        rates[name].append(float(count) / (time.monotonic() - start))
    assert held.stats()['states'][0] == 'in reset', 'the machine is too slow'
    held.close()
  free.close()
  return {
    'others_steps_per_s_one_held': measure.spread(rates['held'], 1),
    'others_steps_per_s_none_held': measure.spread(rates['free'], 1),
    'held_over_free': round(sum(rates['held']) / sum(rates['free']), 4),
  }


def _kills(args: argparse.Namespace) -> dict[str, Any]:
  before = _left()
  pool = _pool([{'cpu_ms': args.cpu_ms, 'length': 50}] * args.envs, max_restarts=10**6)
  playing = _left()
  rng = random.Random(0)
  kills = failures = restarted = steps = 0
  end = time.monotonic() + args.kill_s
  next_kill = time.monotonic()

  def done(ready: base.Ready) -> bool:
    nonlocal kills, failures, restarted, steps, next_kill
    failures += len(ready.failures)
    restarted += len(ready.restarted)
    steps += len(ready.env_ids)
    now = time.monotonic()
    if now > next_kill:
      next_kill = now + 2.0
      running = [pid for pid in pool.stats()['pids'] if pid]
      if running:
        os.kill(rng.choice(running), signal.SIGKILL)
        kills += 1
    return now > end

  _play(pool, done)
  stats = pool.stats()
  late = _left()
  pool.close()
  return {
    'kills': kills,
    'failures_reported': failures,
    'restarts': stats['restarts'],
    'came_back': restarted,
    'steps_per_s': round(steps / args.kill_s, 1),
    'before': before,
    'at_the_start': playing,
    'at_the_end': late,
    'after': _left(),
  }


def _left() -> dict[str, int]:
  """What leaks would be seen in."""
  children = psutil.Process().children(recursive=True)
  return {
    'file_descriptors': len(os.listdir('/proc/self/fd')),
    'dev_shm': len(os.listdir('/dev/shm')),
    'processes': len(children),
    'zombies': sum(p.status() == psutil.STATUS_ZOMBIE for p in children),
    'rss_mb': round(psutil.Process().memory_info().rss / 2**20),
  }


if __name__ == '__main__':
  sys.exit(main())
