"""The whole system on Atari: CPU-seconds of the process tree per 1,000 agent steps.

  python -m experiments.benchmarks.end_to_end_benchmark --config benchmark_shallow

Starts the main job, lets it warm up, measures over a window and prints one JSON
object. CPU-seconds are the steady figure on a shared machine; steps a second are
those seen, and projected to all cores free.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from experiments.benchmarks import measure
from impala_jax.runtime import versions


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--config', default='benchmark_shallow')
  parser.add_argument('--warmup', type=float, default=25.0, help='seconds of training')
  parser.add_argument('--seconds', type=float, default=60.0, help='of the window')
  parser.add_argument('--repeats', type=int, default=3, help='windows')
  parser.add_argument('--transport', default=None)
  parser.add_argument('--set', action='append', default=[], help='section.field=value')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as directory:
    print(json.dumps(_measure(args, pathlib.Path(directory) / 'run'), indent=1))
  return 0


def _measure(args: argparse.Namespace, run_dir: pathlib.Path) -> dict[str, Any]:
  settings = [f'--set={s}' for s in args.set]
  if args.transport:
    settings.append(f'--transport={args.transport}')
  command = [
    sys.executable, '-m', 'impala_jax', 'train', f'--config={args.config}',
    f'--run_dir={run_dir}', '--view=none', *settings,
  ]  # fmt: skip
  start = time.monotonic()
  process = subprocess.Popen(command, stdout=sys.stderr)
  tree = measure.ProcessTree(process.pid)
  try:
    status = _next_status(process, run_dir, {}, timeout=300)
    first_update = time.monotonic() - start
    while status['wall_seconds'] < args.warmup:
      status = _next_status(process, run_dir, status)
    windows = []
    for _ in range(args.repeats):
      cpu, before = tree.cpu_seconds(), status
      while status['time'] - before['time'] < args.seconds:
        status = _next_status(process, run_dir, status)
      windows.append(_window(before, status, tree.cpu_seconds() - cpu))
    memory = tree.memory_mb()
  finally:
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)
    tree.close()
  cpu_per_1000 = [w['cpu_seconds_per_1000'] for w in windows]
  cores = os.cpu_count() or 1
  return {
    'benchmark': 'end_to_end',
    'config': args.config,
    'settings': args.set,
    'cpu_seconds_per_1000_agent_steps': measure.spread(cpu_per_1000),
    'agent_steps_per_second_seen': measure.spread([w['steps_rate'] for w in windows]),
    f'agent_steps_per_second_on_{cores}_free_cores': round(
      1000 * cores / sorted(cpu_per_1000)[len(windows) // 2]
    ),
    'policy_lag_mean': measure.spread([w['lag'] for w in windows]),
    'seconds_to_first_update': round(first_update, 1),
    'peak_pss_mb': round(tree.peak_pss_mb),
    'peak_rss_mb': round(tree.peak_rss_mb),
    'pss_mb_by_process': memory,
    'bottleneck': status['bottleneck'],
    'versions': versions.installed(),
  }


def _window(
  before: dict[str, Any], after: dict[str, Any], cpu: float
) -> dict[str, float]:
  repeat = after['frames_per_second'] / max(after['agent_steps_per_second'], 1e-9)
  steps = (after['frames'] - before['frames']) / (repeat or 1.0)
  return {
    'cpu_seconds_per_1000': 1000 * cpu / steps,
    'steps_rate': steps / (after['time'] - before['time']),
    'lag': after['policy_lag_mean'],
  }


def _next_status(
  process: subprocess.Popen[bytes],
  run_dir: pathlib.Path,
  last: dict[str, Any],
  timeout: float = 120.0,
) -> dict[str, Any]:
  """The next record with at least one update; fails where none comes."""
  deadline = time.monotonic() + timeout
  while time.monotonic() < deadline:
    if process.poll() is not None:
      raise SystemExit(f'the run ended with exit code {process.returncode}')
    try:
      status = json.loads((run_dir / 'status.json').read_text())
    except (OSError, ValueError):
      status = {}
    if status.get('updates') and status.get('time') != last.get('time'):
      return status
    time.sleep(0.1)
  raise SystemExit(f'no progress in {timeout:.0f} s; see {run_dir}/logs')


if __name__ == '__main__':
  sys.exit(main())
