"""The learner's update alone: time and CPU of one update, JSON out.

  python -m experiments.benchmarks.learner_benchmark --torso deep --batch 8

Batches are random sound unrolls in host memory; each update includes its transfer.
"""

import argparse
import json
import sys
import time

import jax
import numpy as np

from experiments.benchmarks import measure
from impala_jax import config as config_lib
from impala_jax import losses, optimizers, types, unroll_layout
from impala_jax.agents import agent as agent_lib
from impala_jax.learning import learner as learner_lib
from impala_jax.runtime import allocator, versions


def parser() -> argparse.ArgumentParser:
  """Of what `make` takes, too."""
  found = argparse.ArgumentParser(description=__doc__)
  found.add_argument('--torso', default='nature', choices=config_lib.TORSOS)
  found.add_argument('--hidden', type=int, default=512)
  found.add_argument('--lstm', type=int, default=0)
  found.add_argument('--frame_stack', type=int, default=4)
  found.add_argument('--frame', default='84,84,1', help='height,width,channels')
  found.add_argument('--unroll', type=int, default=20)
  found.add_argument('--batch', type=int, default=8)
  found.add_argument('--dtype', default='float32', choices=config_lib.DTYPES)
  found.add_argument('--repeats', type=int, default=7)
  found.add_argument('--updates', type=int, default=2, help='per repeat')
  found.add_argument(
    '--serve', action='store_true', help='measure after each line of the input'
  )
  return found


def main() -> int:
  args = parser().parse_args()
  allocator.keep_memory()  # As the learner's role does.
  learner, layout = make(args)
  batches = [random_rows(layout, args.batch, seed) for seed in range(3)]
  state = learner.init(0)
  start = time.perf_counter()
  state, _, figures = learner.update(state, learner.put(batches[0]))
  jax.block_until_ready(figures)
  compile_seconds = time.perf_counter() - start

  def measure_once() -> tuple[float, float]:
    """Milliseconds of an update, on the clock and of the CPU."""
    nonlocal state, figures
    before, before_cpu = time.perf_counter(), time.process_time()
    for i in range(args.updates):
      state, _, figures = learner.update(state, learner.put(batches[i % 3]))
    jax.block_until_ready(figures)
    passed = time.perf_counter() - before, time.process_time() - before_cpu
    return passed[0] / args.updates * 1e3, passed[1] / args.updates * 1e3

  if args.serve:
    print(json.dumps({'versions': versions.installed()}), flush=True)
    for _ in sys.stdin:
      wall_ms, cpu_ms = measure_once()
      answer = {
        'update_ms': wall_ms,
        'update_cpu_ms': cpu_ms,
        'peak_rss_mb': measure.peak_rss_mb(),
      }
      print(json.dumps(answer), flush=True)
    return 0
  wall, cpu = zip(*(measure_once() for _ in range(args.repeats)), strict=True)
  assert int(learner_lib.to_host(state).skipped) == 0, 'a benchmark batch was refused'
  steps = args.batch * args.unroll
  median = sorted(wall)[len(wall) // 2]
  result = {
    'benchmark': 'learner',
    'arguments': vars(args),
    'device': str(jax.local_devices()[0]),
    'devices': jax.local_device_count(),
    'update_ms': measure.spread(wall, 2),
    'update_cpu_ms': measure.spread(cpu, 2),
    'cpu_seconds_per_1000_agent_steps': round(sorted(cpu)[len(cpu) // 2] / steps, 3),
    'agent_steps_per_second': round(1e3 * steps / median),
    'first_update_seconds': round(compile_seconds, 1),
    'parameters': sum(x.size for x in jax.tree.leaves(learner.template().params)),
    'peak_rss_mb': round(measure.peak_rss_mb()),
    'versions': versions.installed(),
  }
  print(json.dumps(result, indent=1))
  return 0


def make(
  args: argparse.Namespace,
) -> tuple[learner_lib.Learner, unroll_layout.UnrollLayout]:
  shape = tuple(int(x) for x in args.frame.split(','))
  spec = types.EnvironmentSpec(types.ArraySpec(shape, np.dtype(np.uint8)), 6)
  network = config_lib.Network(
    torso=args.torso,
    hidden=args.hidden,
    lstm=args.lstm,
    frame_stack=args.frame_stack,
    dtype=args.dtype,
    last_action_reward=args.lstm > 0,
  )
  agent = agent_lib.from_config(network, spec)
  state = jax.tree.map(lambda x: x[0], agent.initial_state(1))
  layout = unroll_layout.UnrollLayout(
    unroll_layout.unroll_spec(spec, state, args.unroll)
  )
  config = config_lib.Config(network=network)
  learner = learner_lib.Learner(
    agent, losses.make_loss(config.loss), optimizers.make_optimizer(config), layout
  )
  return learner, layout


def random_rows(
  layout: unroll_layout.UnrollLayout, batch: int, seed: int
) -> np.ndarray:
  """Random frames, rewards and actions; one episode ends in every other unroll."""
  rng = np.random.default_rng(seed)
  rows = layout.allocate(batch)
  rows[:] = rng.integers(0, 255, rows.shape, np.uint8)
  views = layout.views(rows)
  views.timestep.step_type[:] = types.StepType.MID
  if views.action.shape[1] > 8:
    views.timestep.step_type[::2, 6] = types.StepType.LAST
    views.timestep.step_type[::2, 7] = types.StepType.FIRST
  views.timestep.reward[:] = rng.normal(size=views.timestep.reward.shape)
  views.timestep.discount[:] = 1.0
  views.action[:] = rng.integers(0, 6, views.action.shape)
  views.behaviour_log_prob[:] = -np.log(6.0)
  views.last_action[:] = 0
  views.task_id[:] = 0
  for state in jax.tree.leaves(views.agent_state):
    if state.dtype != np.uint8:
      state[:] = 0
  return rows


if __name__ == '__main__':
  sys.exit(main())
