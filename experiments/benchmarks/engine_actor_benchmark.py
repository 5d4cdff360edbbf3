"""A whole actor on engines in processes of their own, against one bare engine.

  python -m experiments.benchmarks.engine_actor_benchmark --level rooms_watermaze

The actor (pool, inference, unrolls, a `local` queue that is emptied at once) and the
engine, stepped with random actions in one process through nothing but its own calls,
take turns. Prints one JSON object: agent steps per CPU-second of either process tree,
and their ratio. Episodes that begin within a round count on both sides.

With `--suite dmlab` the bare side is `step` and `observations` of `deepmind_lab`
itself; with `doom` it is our single environment, stepped in one process.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import numpy as np

from experiments import configs
from experiments.benchmarks import actor_benchmark, measure
from impala_jax import actor as actor_lib
from impala_jax import components, versions
from impala_jax import config as config_lib
from impala_jax.distributed import local_transport

# Reads seconds from stdin, steps so long, answers with the steps.
_BARE = """
import sys, time
import numpy as np
suite, level = sys.argv[1:]
rng = np.random.default_rng(0)
if suite == 'dmlab':
  import deepmind_lab
  from impala_jax.environments import dmlab, dmlab_actions
  lab = deepmind_lab.Lab(
    dmlab.level_path(level), ['RGB_INTERLEAVED', 'INSTR'],
    config={'width': '96', 'height': '72', 'logLevel': 'WARN'}, renderer='software')
  table = dmlab_actions.table('default')
  lab.reset(seed=1)
  def step():
    lab.step(table[rng.integers(9)], num_steps=4)
    if lab.is_running():
      lab.observations()
    else:
      lab.reset(seed=int(rng.integers(2**31)))
else:
  from impala_jax.environments import doom
  environment = doom.make(level, 1)
  environment.reset()
  def step():
    environment.step(rng.integers(9))
print('ready', flush=True)
for line in sys.stdin:
  end, steps = time.monotonic() + float(line), 0
  while time.monotonic() < end:
    step()
    steps += 1
  print(steps, flush=True)
"""


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--suite', default='dmlab', choices=('dmlab', 'doom'))
  parser.add_argument('--level', default='rooms_watermaze')
  parser.add_argument('--envs', type=int, default=8)
  parser.add_argument('--inference_batch', type=int, default=4)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--round_s', type=float, default=15.0)
  args = parser.parse_args()
  os.environ.setdefault('NPROC', '1')  # As launched actors have it.
  name = {'dmlab': 'dmlab30', 'doom': 'doom'}[args.suite]
  config = config_lib.override(
    configs.get(name),
    [f'environment.levels={args.level}', f'actor.envs_per_actor={args.envs}',
     f'actor.inference_batch={args.inference_batch}', 'network.torso=shallow'],
  )  # fmt: skip
  print(json.dumps(_measure(args, components.build(config)), indent=1))
  return 0


def _measure(args: argparse.Namespace, parts: components.Components) -> dict[str, Any]:
  queue = local_transport.LocalTransport(parts.layout, 4, 16)
  threading.Thread(target=actor_benchmark.empty, args=(queue,), daemon=True).start()
  bare = subprocess.Popen(
    [sys.executable, '-c', _BARE, args.suite, args.level], text=True,
    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
  )  # fmt: skip
  assert bare.stdin is not None
  assert bare.stdout is not None
  environments = parts.make_environments(0)
  params = jax.tree.map(np.asarray, parts.agent.init(jax.random.key(0)))
  stop_at = [0.0]
  actor = actor_lib.Actor(
    parts.agent, environments, parts.layout, queue.writer(),
    actor_benchmark.Constant(params),
    unroll_length=parts.config.actor.unroll_length,
    inference_batch=args.inference_batch,
    should_stop=lambda: time.monotonic() > stop_at[0], environment_patience=600.0,
  )  # fmt: skip
  trees = {
    'bare': measure.ProcessTree(bare.pid),
    'actor': measure.ProcessTree(os.getpid()),
  }
  try:
    if bare.stdout.readline().strip() != 'ready':
      raise SystemExit('the bare engine did not start: see above')
    stop_at[0] = float('inf')
    actor.run(max_unrolls=args.envs)  # All engines are there, all is compiled.
    rates: dict[str, list[float]] = {'bare': [], 'actor': []}
    milliseconds: dict[str, list[float]] = {'policy': [], 'engines': []}
    for _ in range(args.rounds):
      cpu = trees['bare'].cpu_seconds()
      bare.stdin.write(f'{args.round_s}\n')
      bare.stdin.flush()
      steps = int(bare.stdout.readline())
      rates['bare'].append(steps / (trees['bare'].cpu_seconds() - cpu))
      # The bare engine is of this tree, too, and waits meanwhile.
      cpu, steps = trees['actor'].cpu_seconds(), actor.agent_steps
      own = time.process_time()
      stop_at[0] = time.monotonic() + args.round_s
      actor.run()
      steps = actor.agent_steps - steps
      own = time.process_time() - own
      cpu = trees['actor'].cpu_seconds() - cpu
      rates['actor'].append(steps / cpu)
      milliseconds['policy'].append(1e3 * own / steps)
      milliseconds['engines'].append(1e3 * (cpu - own) / steps)
  finally:
    environments.close()
    bare.kill()
    bare.wait()
    queue.close()
  ratios = [a / b for a, b in zip(rates['actor'], rates['bare'], strict=True)]
  total = sum(actor.seconds.values())
  return {
    'benchmark': 'engine_actor',
    'arguments': vars(args),
    'bare_steps_per_cpu_second': measure.spread(rates['bare'], 1),
    'actor_steps_per_cpu_second': measure.spread(rates['actor'], 1),
    'cpu_ms_per_agent_step': {k: measure.spread(v) for k, v in milliseconds.items()},
    'actor_over_bare': measure.spread(ratios, 3),
    'wall_share': {k: round(v / total, 3) for k, v in actor.seconds.items()},
    'versions': versions.installed(),
  }


if __name__ == '__main__':
  sys.exit(main())
