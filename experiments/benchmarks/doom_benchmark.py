"""Random play of ViZDoom's scenarios: returns, and what a step costs.

`python -m experiments.benchmarks.doom_benchmark --episodes 200` prints one JSON object
by level: mean return with its standard error and length of episodes, agent steps per
CPU-second of the engine and this process together, milliseconds of a reset, and the
engine's memory. The mean returns are `random` in `doom_suite.SCENARIOS`.
"""

import json
import time
from typing import Any

import numpy as np
import psutil
from absl import app, flags

from impala_jax.environments.doom import environment as doom
from impala_jax.environments.doom import suite as doom_suite

_LEVELS = flags.DEFINE_list('levels', list(doom_suite.SCENARIOS), 'Scenarios.')
_EPISODES = flags.DEFINE_integer('episodes', 20, 'Episodes of each.', 2)
_SEED = flags.DEFINE_integer('seed', 1, 'Of episodes and actions.')


def measure(level: str, episodes: int, seed: int) -> dict[str, Any]:
  """The figures of one level."""
  environment = doom.Doom(
    level, seed, time_limit=doom_suite.SCENARIOS[level].time_limit
  )
  here = psutil.Process()
  (engine,) = here.children()
  rng = np.random.default_rng(seed)
  num_actions = environment.action_spec().num_values
  returns, lengths, resets = np.zeros(episodes), np.zeros(episodes), []
  start = _cpu(here) + _cpu(engine)
  for i in range(episodes):
    before = time.perf_counter()
    step = environment.reset()
    resets.append(time.perf_counter() - before)
    while not step.last():
      step = environment.step(int(rng.integers(num_actions)))
      returns[i] += step.reward
      lengths[i] += 1
  cpu = _cpu(here) + _cpu(engine) - start
  memory = engine.memory_full_info()
  environment.close()
  return {
    'mean_return': round(float(returns.mean()), 3),
    'standard_error': round(float(returns.std(ddof=1) / np.sqrt(episodes)), 3),
    'least': round(float(returns.min()), 2),
    'most': round(float(returns.max()), 2),
    'mean_length': round(float(lengths.mean()), 1),
    'steps_per_cpu_s': round(float(lengths.sum()) / cpu, 1),
    'reset_ms': round(1000 * float(np.median(resets)), 2),
    'engine_rss_mb': round(memory.rss / 2**20, 1),
    'engine_pss_mb': round(memory.pss / 2**20, 1),
  }


def _cpu(process: psutil.Process) -> float:
  times = process.cpu_times()
  return times.user + times.system


def main(argv: list[str]) -> None:
  del argv
  result = {
    'benchmark': 'doom',
    'episodes': _EPISODES.value,
    'seed': _SEED.value,
    'levels': {x: measure(x, _EPISODES.value, _SEED.value) for x in _LEVELS.value},
  }
  print(json.dumps(result, indent=2))


if __name__ == '__main__':
  app.run(main)
