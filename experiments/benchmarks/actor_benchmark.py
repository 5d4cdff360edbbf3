"""The actor alone: Atari environments, policy and unrolls, with nobody to learn.

  python -m experiments.benchmarks.actor_benchmark --torso nature --envs 32

Unrolls go into a `local` queue that is emptied at once. Prints one JSON object:
CPU-seconds per 1,000 agent steps of the whole actor and of bare environments
(stepped in turn with it, so that both see the same machine), and where time goes.
"""

import argparse
import json
import os
import sys
import threading
import time
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import measure
from impala_jax import components, types
from impala_jax import config as config_lib
from impala_jax.acting import actor as actor_lib
from impala_jax.acting import policy as policy_lib
from impala_jax.distributed.transport import local as local_transport
from impala_jax.distributed.transport import protocol as transport
from impala_jax.runtime import versions


class Constant:
  """Parameters that never change."""

  def __init__(self, params: types.Nest):
    self._params = params

  def fetch(self, have_version: int) -> tuple[int, types.Nest] | None:
    return None if have_version == 0 else (0, self._params)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--game', default='breakout')
  parser.add_argument('--torso', default='nature', choices=config_lib.TORSOS)
  parser.add_argument('--hidden', type=int, default=512)
  parser.add_argument('--envs', type=int, default=32)
  parser.add_argument('--inference_batch', type=int, default=0)
  parser.add_argument('--unrolls', type=int, default=64, help='per repeat')
  parser.add_argument('--repeats', type=int, default=5)
  args = parser.parse_args()
  os.environ.setdefault('NPROC', '1')  # As launched actors have it.
  parts = components.build(
    config_lib.override(
      config_lib.Config(),
      [
        f'environment.levels={args.game}',
        f'network.torso={args.torso}',
        f'network.hidden={args.hidden}',
        f'actor.envs_per_actor={args.envs}',
        f'actor.inference_batch={args.inference_batch}',
      ],
    )
  )
  print(json.dumps(_measure(args, parts), indent=1))
  return 0


def _measure(args: argparse.Namespace, parts: components.Components) -> dict[str, Any]:
  queue = local_transport.LocalTransport(parts.layout, 8, 64)
  drain = threading.Thread(target=empty, args=(queue,), daemon=True)
  drain.start()
  length = parts.config.actor.unroll_length
  bare = parts.make_environments(0)
  bare.reset(1)
  params = jax.tree.map(np.asarray, parts.agent.init(jax.random.key(0)))
  policy = policy_lib.Local(
    parts.agent,
    Constant(params),
    args.envs,
    unroll_length=length,
    batch=args.inference_batch,
  )
  actor = actor_lib.Actor(
    policy,
    parts.make_environments(0),
    parts.layout,
    queue.writer(),
    unroll_length=length,
  )
  actor.run(max_unrolls=args.envs)  # Compiles.
  whole, alone, rates = [], [], []
  before = dict(actor.seconds)
  for _ in range(args.repeats):
    cpu, steps, start = time.process_time(), actor.agent_steps, time.perf_counter()
    actor.run(max_unrolls=args.unrolls)
    steps = actor.agent_steps - steps
    whole.append(1e3 * (time.process_time() - cpu) / steps)
    rates.append(steps / (time.perf_counter() - start))
    alone.append(_bare(bare, args.unrolls * length))
  seconds = {k: v - before[k] for k, v in actor.seconds.items()}
  total = sum(seconds.values())
  queue.close()
  return {
    'benchmark': 'actor',
    'arguments': vars(args),
    'cpu_seconds_per_1000_agent_steps': measure.spread(whole),
    'environments_alone': measure.spread(alone),
    'share_that_is_not_environments': measure.spread(
      [1 - a / w for a, w in zip(alone, whole, strict=True)], 3
    ),
    'agent_steps_per_second': measure.spread(rates, 0),
    'wall_share': {k: round(v / total, 3) for k, v in seconds.items()},
    'peak_rss_mb': round(measure.peak_rss_mb()),
    'versions': versions.installed(),
  }


def _bare(environment: Any, steps: int) -> float:
  """CPU-seconds per 1,000 steps of random actions."""
  rng = np.random.default_rng(0)
  cpu, done = time.process_time(), 0
  while done < steps:
    ready = environment.recv(timeout=60)
    actions = rng.integers(environment.spec.num_actions, size=len(ready.env_ids))
    environment.send(ready.env_ids, actions.astype(np.int32))
    done += len(ready.env_ids)
  return 1e3 * (time.process_time() - cpu) / done


def empty(queue: local_transport.LocalTransport) -> None:
  """Reads what comes and forgets it, until the queue is closed."""
  while True:
    try:
      queue.read(timeout=1.0).release()
    except TimeoutError:
      continue
    except transport.Closed:
      return


if __name__ == '__main__':
  sys.exit(main())
