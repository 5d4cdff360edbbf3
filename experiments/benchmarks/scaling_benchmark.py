"""Throughput against the number of actors, up to what the learner takes.

  python -m experiments.benchmarks.scaling_benchmark --png docs/scaling.png

One learner process with Reverb and a small network; actor processes join it: 1, 2, 4
and so on. A step of their environments costs a fixed time, and sleeps through it, so
that two cores are enough for many: what is shown is that nothing between actors and
learner holds the others up, not how fast a machine computes. Ideal is so many times
what one actor reaches.

Prints one JSON object; with `--png` draws it.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from experiments.benchmarks import measure, scaling_plot
from impala_jax import components, configs
from impala_jax import config as config_lib
from impala_jax.distributed.roles import actor as actor_role
from impala_jax.distributed.roles import learner as learner_role
from impala_jax.environments import catch
from impala_jax.launching import processes as role_processes
from impala_jax.runtime import files, role_environment, versions
from impala_jax.runtime.run_directory import RunDirectory

_START = 300.0  # Seconds for a number of actors to be at work.
_LEAVE = 60.0


class SlowCatch(catch.Catch):
  """Catch that sleeps for `seconds` in each step and reset."""

  def __init__(self, seconds: float, seed: int | None = None):
    super().__init__(seed=seed)
    self._seconds = seconds

  def reset(self) -> Any:
    time.sleep(self._seconds)
    return super().reset()

  def step(self, action: int) -> Any:
    time.sleep(self._seconds)
    return super().step(action)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--actors', default='1,2,4,8,16,32', help='numbers, ascending')
  parser.add_argument(
    '--step_ms', type=float, default=5.0, help='of one environment; they take turns'
  )
  parser.add_argument('--envs', type=int, default=4, help='of an actor')
  parser.add_argument('--seconds', type=float, default=20.0, help='of a window')
  parser.add_argument(
    '--settle',
    type=float,
    default=10.0,
    help='seconds from the last report to a window',
  )
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--unroll', type=int, default=10)
  parser.add_argument('--hidden', type=int, default=64)
  parser.add_argument('--png', help='where to draw the figure')
  parser.add_argument('--role', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.role:
    return _play(args)
  try:
    counts = [int(n) for n in args.actors.split(',')]
  except ValueError:
    parser.error(f'--actors={args.actors}: must be numbers with commas between them')
  if counts != sorted(set(counts)) or counts[0] < 1:
    parser.error(f'--actors={args.actors}: must ascend from 1 or more')
  if min(args.step_ms, args.seconds) <= 0:
    parser.error('--step_ms and --seconds must be positive')
  with tempfile.TemporaryDirectory() as folder:
    report = _measure(args, counts, pathlib.Path(folder))
  if args.png:
    scaling_plot.draw(report, pathlib.Path(args.png))
  print(json.dumps(report, indent=1))
  return 0


def _play(args: argparse.Namespace) -> int:
  """A learner's or an actor's process: the same as in any run but for the game."""
  here = role_environment.RoleEnvironment.read()
  stop = threading.Event()
  signal.signal(signal.SIGTERM, lambda *_: stop.set())
  should_stop = lambda: stop.is_set() or os.getppid() != here.parent
  saved = json.loads(RunDirectory(here.run_dir).config.read_text())
  custom = components.Custom(
    environment=functools.partial(SlowCatch, args.step_ms / 1e3)
  )
  parts = components.build(config_lib.from_dict(saved['config']), custom)
  if args.role == 'learner':
    learner_role.run(parts, here, should_stop)
  else:
    actor_role.run(parts, here, should_stop)
  return 0


def _measure(
  args: argparse.Namespace, counts: list[int], run_dir: pathlib.Path
) -> dict[str, Any]:
  config = config_lib.override(
    configs.get('catch'),
    [
      f'actor.num_actors={counts[-1]}',
      f'actor.envs_per_actor={args.envs}',
      f'actor.unroll_length={args.unroll}',
      f'learner.batch_size={args.batch}',
      f'network.hidden={args.hidden}',
      'learner.total_frames=1e11',
      'learner.metrics_interval=0.2',
      'learner.checkpoint_interval=1e6',
      'transport.kind=reverb',
    ],
  )
  saved = {'config': config_lib.to_dict(config)}
  files.write_json(RunDirectory(run_dir).config, saved)
  processes = {'learner': _start(args, run_dir, 'learner', 0)}
  tree = measure.ProcessTree(os.getpid())
  points = []
  try:
    for count in counts:
      for index in range(len(processes) - 1, count):
        processes[f'actor-{index}'] = _start(args, run_dir, 'actor', index)
      _wait_for(run_dir, count, processes)
      time.sleep(args.settle)
      points.append({'actors': count, **_window(args, run_dir, processes, tree)})
      print(points[-1], file=sys.stderr, flush=True)
    peak = tree.peak_pss_mb
  finally:
    tree.close()
    _end(processes)
  for point in points:
    ideal = point['actors'] * points[0]['steps_per_second'] / points[0]['actors']
    point['of_ideal'] = round(point['steps_per_second'] / ideal, 3)
  return {
    'benchmark': 'scaling',
    'arguments': vars(args),
    'steps_per_second_of_the_environments_of_one_actor': round(1e3 / args.step_ms, 1),
    'points': points,
    'peak_pss_mb': round(peak),
    'cores': os.cpu_count(),
    'load_at_the_end': round(os.getloadavg()[0], 1),
    'versions': versions.installed(),
  }


def _start(
  args: argparse.Namespace, run_dir: pathlib.Path, role: str, index: int
) -> subprocess.Popen[bytes]:
  command = [
    sys.executable,
    '-m',
    'experiments.benchmarks.scaling_benchmark',
    f'--role={role}',
    f'--step_ms={args.step_ms}',
  ]
  environment = role_processes.environment_of(RunDirectory(run_dir), role, index, 0)
  with open(run_dir / f'{role}-{index}.log', 'ab') as log:
    return subprocess.Popen(
      command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
    )


def _wait_for(
  run_dir: pathlib.Path, actors: int, processes: dict[str, subprocess.Popen[bytes]]
) -> None:
  deadline = time.monotonic() + _START
  while True:
    _check(run_dir, processes)
    status = RunDirectory(run_dir).read_status()
    came = sum(p['role'] == 'actor' for p in status.get('peers', []))
    updates = status.get('updates', 0)
    if came >= actors and updates:
      return
    if time.monotonic() > deadline:
      raise SystemExit(
        f'{came} of {actors} actors and {updates} updates in {_START:.0f} s'
      )
    time.sleep(0.2)


def _window(
  args: argparse.Namespace,
  run_dir: pathlib.Path,
  processes: dict[str, subprocess.Popen[bytes]],
  tree: measure.ProcessTree,
) -> dict[str, float]:
  begin, cpu = time.time(), tree.cpu_seconds()
  while time.time() < begin + args.seconds:
    _check(run_dir, processes)
    time.sleep(0.2)
  cpu = tree.cpu_seconds() - cpu
  lines = files.read_json_lines(RunDirectory(run_dir).metrics)
  records = [r for r in lines if r['time'] >= begin]
  return {
    **figures(records),
    'cores_used': round(cpu / (time.time() - begin), 2),
  }


def figures(records: list[dict[str, Any]]) -> dict[str, float]:
  """Throughput over records of a learner, from the first update in them to the last.

  Raises:
    SystemExit: there were fewer than two updates.
  """
  # Records are denser than updates: those that saw one tell its time.
  fresh = [b for a, b in itertools.pairwise(records) if b['updates'] > a['updates']]
  if len(fresh) < 2:
    raise SystemExit('fewer than two updates in a window: make --seconds longer')
  first, last = fresh[0], fresh[-1]
  seconds = last['time'] - first['time']
  waits = [r['learner_time/wait'] for r in records]
  held = [r.get('actor_time/learner') or 0.0 for r in records]
  return {
    'steps_per_second': round((last['frames'] - first['frames']) / seconds, 1),
    'updates': last['updates'] - first['updates'],
    'learner_waits': round(sum(waits) / len(waits), 3),
    'actors_held_back': round(sum(held) / len(held), 3),
    'policy_lag_mean': round(sum(r['policy_lag_mean'] for r in fresh) / len(fresh), 2),
    'unrolls_lost': last['unrolls_lost'],
  }


def _check(
  run_dir: pathlib.Path, processes: dict[str, subprocess.Popen[bytes]]
) -> None:
  for name, process in processes.items():
    if process.poll() is not None:
      log = 'learner-0' if name == 'learner' else name
      cause = role_processes.cause(run_dir / f'{log}.log')
      raise SystemExit(f'{name} ended with exit code {process.returncode}: {cause}')


def _end(processes: dict[str, subprocess.Popen[bytes]]) -> None:
  """The learner first, as in any run: it tells the actors."""
  processes['learner'].terminate()
  deadline = time.monotonic() + _LEAVE
  for process in processes.values():
    try:
      process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()


if __name__ == '__main__':
  sys.exit(main())
