"""Times V-trace alone: `python -m experiments.benchmarks.vtrace_benchmark`.

Prints one JSON object: microseconds per jitted call of each method and size. Rounds of
the methods are interleaved, so that a busy machine troubles all of them alike; the
minimum is the least disturbed figure.
"""

import functools
import json
import platform
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from impala_jax import vtrace

SIZES = ((20, 32), (20, 1024), (100, 32), (100, 1024))
METHODS = ('scan', 'associative')
ROUNDS = 40
ROUND_SECONDS = 0.01  # Calls per round are chosen to take about this long.


def measure(steps: int, batch: int) -> dict[str, Any]:
  """Times all methods on random float32 [steps, batch] inputs."""
  rng = np.random.default_rng(0)
  log_rhos, discounts, rewards, values, next_values = (
    jax.device_put(x.astype(np.float32)) for x in rng.normal(size=(5, steps, batch))
  )
  valid = jax.device_put(rng.uniform(size=(steps, batch)) < 0.95)
  calls = {}
  for method in METHODS:
    f = jax.jit(functools.partial(vtrace.vtrace, method=method))
    calls[method] = functools.partial(
      f, log_rhos, discounts, rewards, values, next_values, valid=valid
    )
  repeats = {method: _repeats(call) for method, call in calls.items()}
  times: dict[str, list[float]] = {method: [] for method in METHODS}
  for _ in range(ROUNDS):
    for method, call in calls.items():
      times[method].append(_time(call, repeats[method]))
  results = {
    method: {
      'min_us': round(min(t) * 1e6, 1),
      'median_us': round(float(np.median(t)) * 1e6, 1),
    }
    for method, t in times.items()
  }
  return {'steps': steps, 'batch': batch, **results}


def _time(call: Callable[[], Any], repeats: int) -> float:
  """Seconds per call, each waited for."""
  start = time.perf_counter()
  for _ in range(repeats):
    jax.block_until_ready(call())
  return (time.perf_counter() - start) / repeats


def _repeats(call: Callable[[], Any]) -> int:
  jax.block_until_ready(call())  # Compiles.
  return max(1, round(ROUND_SECONDS / _time(call, 20)))


def main() -> None:
  start = time.perf_counter()
  sizes = [measure(steps, batch) for steps, batch in SIZES]
  usage = resource.getrusage(resource.RUSAGE_SELF)
  report = {
    'benchmark': 'vtrace',
    'device': jax.devices()[0].device_kind,
    'platform': jax.default_backend(),
    'jax': jax.__version__,
    'numpy': np.__version__,
    'python': platform.python_version(),
    'results': sizes,
    'wall_s': round(time.perf_counter() - start, 2),
    'cpu_s': round(usage.ru_utime + usage.ru_stime, 2),
    'peak_rss_mb': round(usage.ru_maxrss / 1024),
  }
  print(json.dumps(report, indent=2))


if __name__ == '__main__':
  main()
