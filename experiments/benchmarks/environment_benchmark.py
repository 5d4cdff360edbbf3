"""Times Atari environments alone.

`python -m experiments.benchmarks.environment_benchmark --game breakout` prints one
JSON object: CPU-seconds of the whole process per 1,000 agent steps (the steady
figure on a shared machine) and wall-clock steps/s, for our `AtariVector` and for
ale-py's own vector with and without its frame stack, all under random actions.
Rounds of the three are interleaved, so that a busy machine troubles all alike.
"""

import importlib.metadata
import json
import platform
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags

from impala_jax.environments.atari import environment as atari

_GAME = flags.DEFINE_string('game', 'breakout', 'Name of the game.')
_ENVS = flags.DEFINE_integer('num_envs', 32, 'Environments of each kind.', 1)
_THREADS = flags.DEFINE_integer('env_threads', 1, 'Native threads of each kind.', 1)
_ROUNDS = flags.DEFINE_integer('rounds', 15, 'Rounds of each kind.', 1)
_STEPS = flags.DEFINE_integer('steps', 50, 'Steps of each environment in a round.', 1)


def measure(
  game: str, num_envs: int, env_threads: int, rounds: int, steps: int
) -> dict[str, Any]:
  """The figures of each kind: medians over `rounds`, and the least CPU time."""
  plays: dict[str, Callable[[np.ndarray], None]] = {
    'atari_vector': _ours(game, num_envs, env_threads),
    'ale_vector_stack_1': _bare(game, num_envs, env_threads, 1),
    'ale_vector_stack_4': _bare(game, num_envs, env_threads, 4),
  }
  num_actions = atari.spec(game).num_actions
  rng = np.random.default_rng(0)
  cpu: dict[str, list[float]] = {name: [] for name in plays}
  wall: dict[str, list[float]] = {name: [] for name in plays}
  for _ in range(rounds):
    # The same actions for all kinds, so that all play alike.
    actions = rng.integers(0, num_actions, (steps, num_envs)).astype(np.int32)
    for name, play in plays.items():
      start = time.perf_counter(), time.process_time()
      play(actions)
      wall[name].append(time.perf_counter() - start[0])
      cpu[name].append(time.process_time() - start[1])
  per_round = steps * num_envs
  kinds = {
    name: {
      'cpu_s_per_1000_steps': round(1000 * float(np.median(cpu[name])) / per_round, 4),
      'min_cpu_s_per_1000_steps': round(1000 * min(cpu[name]) / per_round, 4),
      'steps_per_s': round(per_round / float(np.median(wall[name])), 1),
    }
    for name in plays
  }
  ours, bare = np.array(cpu['atari_vector']), np.array(cpu['ale_vector_stack_1'])
  overhead = 1000 * float(np.median(ours - bare)) / per_round
  return {'kinds': kinds, 'overhead_cpu_s_per_1000_steps': round(overhead, 4)}


def _ours(game: str, count: int, threads: int) -> Callable[[np.ndarray], None]:
  vector = atari.AtariVector(game, count, episodic_life=True, env_threads=threads)
  vector.reset(1)
  vector.recv(60.0)
  ids = np.arange(count, dtype=np.int32)

  def play(actions: np.ndarray) -> None:
    for row in actions:
      vector.send(ids, row)
      vector.recv(60.0)

  return play


def _bare(
  game: str, count: int, threads: int, stack: int
) -> Callable[[np.ndarray], None]:
  from ale_py import vector_env

  vector = vector_env.AtariVectorEnv(
    game, count, num_threads=threads, stack_num=stack, use_fire_reset=False
  )
  vector.reset(seed=1)

  def play(actions: np.ndarray) -> None:
    for row in actions:
      vector.send(row)
      vector.recv()

  return play


def main(argv: list[str]) -> None:
  del argv
  settings: dict[str, Any] = {
    'game': _GAME.value,
    'num_envs': _ENVS.value,
    'env_threads': _THREADS.value,
    'rounds': _ROUNDS.value,
    'steps': _STEPS.value,
  }
  result = {
    'benchmark': 'environment',
    **settings,
    **measure(**settings),
    'peak_rss_mb': round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    'versions': {
      'python': platform.python_version(),
      **{p: importlib.metadata.version(p) for p in ('ale-py', 'numpy')},
    },
  }
  print(json.dumps(result, indent=2))


if __name__ == '__main__':
  app.run(main)
