"""A whole actor on engines in processes of their own, against one bare engine.

  python -m experiments.benchmarks.engine_actor_benchmark --level rooms_watermaze

The actor (pool, inference, unrolls, a `local` queue that is emptied at once) and the
engine, stepped with random actions in one process through nothing but its own calls,
take turns. Prints one JSON object: agent steps per CPU-second of either side, and their
ratio. What episodes cost to begin counts on neither: the bare engine's is taken off,
and rounds of the actor in which an episode ended are left out (`rounds_with_resets`).
Engines that take turns find the caches full of what the others left: `bare_cold` is the
bare engine with the caches overwritten between its steps, which is not counted.

With `--suite dmlab` the bare side is `step` and `observations` of `deepmind_lab`
itself, with the renderer's own number of threads; with `doom` it is our single
environment, stepped in one process.
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

from experiments.benchmarks import actor_benchmark, measure
from impala_jax import components, configs
from impala_jax import config as config_lib
from impala_jax.acting import actor as actor_lib
from impala_jax.acting import policy as policy_lib
from impala_jax.distributed.transport import local as local_transport
from impala_jax.runtime import versions

# Reads seconds, and whether caches are to be cold, from stdin; steps so long; answers
# with the steps and their CPU-seconds.
_BARE = """
import sys, time
import numpy as np
suite, level = sys.argv[1:]
rng = np.random.default_rng(0)
filler = np.zeros(64 << 17)  # 64 MB.
if suite == 'dmlab':
  import deepmind_lab
  from impala_jax.environments.dmlab import actions as dmlab_actions
  from impala_jax.environments.dmlab import environment as dmlab
  lab = deepmind_lab.Lab(
    dmlab.level_path(level), ['RGB_INTERLEAVED', 'INSTR'],
    config={'width': '96', 'height': '72', 'logLevel': 'WARN'}, renderer='software')
  table = dmlab_actions.table('default')
  lab.reset(seed=1)
  def step():
    lab.step(table[rng.integers(9)], num_steps=4)
    if lab.is_running():
      lab.observations()
      return True
    return False
  def reset():
    lab.reset(seed=int(rng.integers(2**31)))
else:
  from impala_jax.environments.doom import environment as doom
  environment = doom.make(level, 1)
  reset = environment.reset
  reset()
  def step():
    return not environment.step(rng.integers(9)).last()
print('ready', flush=True)
for line in sys.stdin:
  seconds, cold = map(float, line.split())
  end, steps, apart = time.monotonic() + seconds, 0, 0.0
  begin = time.process_time()
  while time.monotonic() < end:
    running = step()
    steps += 1
    if cold or not running:
      before = time.process_time()
      if cold:
        filler += 1
      if not running:
        reset()
      apart += time.process_time() - before
  print(steps, time.process_time() - begin - apart, flush=True)
"""


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--suite', default='dmlab', choices=('dmlab', 'doom'))
  parser.add_argument('--level', default='rooms_watermaze')
  parser.add_argument('--envs', type=int, default=32)
  parser.add_argument('--inference_batch', type=int, default=0)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--round_s', type=float, default=15.0)
  args = parser.parse_args()
  os.environ.setdefault('NPROC', '1')  # As launched actors have it.
  name = {'dmlab': 'dmlab30', 'doom': 'doom'}[args.suite]
  config = config_lib.override(
    configs.get(name),
    [
      f'environment.levels={args.level}',
      f'actor.envs_per_actor={args.envs}',
      f'actor.inference_batch={args.inference_batch}',
      'network.torso=shallow',
    ],
  )
  print(json.dumps(_measure(args, components.build(config)), indent=1))
  return 0


def _measure(args: argparse.Namespace, parts: components.Components) -> dict[str, Any]:
  queue = local_transport.LocalTransport(parts.layout, 4, 16)
  threading.Thread(target=actor_benchmark.empty, args=(queue,), daemon=True).start()
  bare = subprocess.Popen(
    [sys.executable, '-c', _BARE, args.suite, args.level],
    text=True,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  )
  assert bare.stdin is not None
  assert bare.stdout is not None
  environments = parts.make_environments(0)
  params = jax.tree.map(np.asarray, parts.agent.init(jax.random.key(0)))
  length = parts.config.actor.unroll_length
  policy = policy_lib.Local(
    parts.agent,
    actor_benchmark.Constant(params),
    environments.num_envs,
    unroll_length=length,
    batch=args.inference_batch,
  )
  actor = actor_lib.Actor(
    policy,
    environments,
    parts.layout,
    queue.writer(),
    unroll_length=length,
    environment_patience=600.0,
  )
  tree = measure.ProcessTree(os.getpid(), interval=60.0)  # Looking costs CPU time.
  try:
    if bare.stdout.readline().strip() != 'ready':
      raise SystemExit('the bare engine did not start: see above')
    actor.run(max_unrolls=args.envs)  # All engines are there, all is compiled.
    rounds = [
      _round(args.round_s, bare, actor, environments, tree) for _ in range(args.rounds)
    ]
  finally:
    environments.close()
    bare.kill()
    bare.wait()
    queue.close()
    tree.close()
  kept = [r for r in rounds if not r['resets']]
  if not kept:
    raise SystemExit('episodes ended in every round: ask for more or shorter ones')
  column = lambda key: [r[key] for r in kept]
  total = sum(actor.seconds.values())
  return {
    'benchmark': 'engine_actor',
    'arguments': vars(args),
    'rounds_with_resets': len(rounds) - len(kept),
    'bare_steps_per_cpu_second': measure.spread(column('bare'), 1),
    'bare_cold_steps_per_cpu_second': measure.spread(column('bare_cold'), 1),
    'actor_steps_per_cpu_second': measure.spread(column('actor'), 1),
    'cpu_ms_per_agent_step': {
      'policy': measure.spread(column('policy_ms')),
      'engines': measure.spread(column('engines_ms')),
    },
    'actor_over_bare': measure.spread([r['actor'] / r['bare'] for r in kept], 3),
    'bare_cold_over_bare': measure.spread(
      [r['bare_cold'] / r['bare'] for r in kept], 3
    ),
    'wall_share': {k: round(v / total, 3) for k, v in actor.seconds.items()},
    'versions': versions.installed(),
  }


def _bare(bare: 'subprocess.Popen[str]', seconds: float, cold: bool) -> float:
  """Steps per CPU-second of the bare engine."""
  assert bare.stdin is not None
  assert bare.stdout is not None
  bare.stdin.write(f'{seconds} {int(cold)}\n')
  bare.stdin.flush()
  steps, cpu = map(float, bare.stdout.readline().split())
  return steps / cpu


def _round(
  seconds: float,
  bare: 'subprocess.Popen[str]',
  actor: actor_lib.Actor,
  environments: Any,
  tree: measure.ProcessTree,
) -> dict[str, float]:
  """All sides for so many seconds each: what they did for a second of CPU time."""
  warm, cold = (_bare(bare, seconds, cold) for cold in (False, True))
  resetting = lambda: 'in reset' in environments.stats()['states']
  resets = resetting()
  # The bare engine is of this tree, too, and waits meanwhile.
  cpu, own = tree.cpu_seconds(), time.process_time()
  steps, episodes = actor.agent_steps, len(actor.episodes)
  end = time.monotonic() + seconds
  # Not `run`, which when stopped may have taken time steps that it leaves unanswered.
  while time.monotonic() < end:
    actor.step()
  steps = actor.agent_steps - steps
  own = time.process_time() - own
  cpu = tree.cpu_seconds() - cpu
  return {
    'resets': resets or resetting() or len(actor.episodes) > episodes,
    'bare': warm,
    'bare_cold': cold,
    'actor': steps / cpu,
    'policy_ms': 1e3 * own / steps,
    'engines_ms': 1e3 * (cpu - own) / steps,
  }


if __name__ == '__main__':
  sys.exit(main())
