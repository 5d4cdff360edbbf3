"""Named configurations. `get(name)` gives one; flags change single fields.

The `paper_*` settings are those of Espeholt et al. 2018, table of fixed settings;
`small` and `pong` are tuned for two CPU cores.
"""

import dataclasses
import difflib
from collections.abc import Callable

from impala_jax import config as config_lib
from impala_jax.config import (
  Actor,
  Config,
  Environment,
  Evaluator,
  Learner,
  Loss,
  Network,
  Optimizer,
  Transport,
)


def small() -> Config:
  """The default of `make train`: learns visibly in ten minutes on two cores.

  Small batches and Adam instead of the paper's: an update every 320 frames makes
  more of few frames than RMSProp on batches of 2,560.
  """
  return Config(
    name='small',
    environment=Environment(levels=('breakout',)),
    network=Network(torso='shallow', hidden=256),
    optimizer=Optimizer(name='adam', learning_rate=7e-4, epsilon=1e-5),
    actor=Actor(num_actors=1, envs_per_actor=16, env_threads=2),
    learner=Learner(batch_size=4, total_frames=3_000_000),
    transport=Transport(queue_batches=4),
  )


def pong() -> Config:
  """Pong on two cores: +15 after about 10 M frames, so stop it when you like."""
  base = small()
  return dataclasses.replace(
    base,
    name='pong',
    environment=Environment(levels=('pong',)),
    # The rate of learning must not fall before the score has risen.
    learner=dataclasses.replace(base.learner, total_frames=40_000_000),
  )


def catch() -> Config:
  """Catch: seconds to minutes; what the tests train."""
  return Config(
    name='catch',
    environment=Environment(suite='catch', levels=('catch',)),
    network=Network(torso='mlp', hidden=64, frame_stack=1),
    loss=Loss(entropy_cost=0.003),
    optimizer=Optimizer(name='adam', learning_rate=2e-3, epsilon=1e-8),
    actor=Actor(envs_per_actor=16, unroll_length=9),
    learner=Learner(batch_size=16, total_frames=300_000, metrics_interval=0.5),
    evaluator=Evaluator(interval=5.0, episodes=32, video=False),
  )


def paper_atari_shallow() -> Config:
  """Atari, one game, shallow network (no LSTM), 200 M frames."""
  return Config(
    name='paper_atari_shallow',
    network=Network(torso='shallow', hidden=256, frame_stack=4),
    actor=Actor(num_actors=4),
    learner=Learner(batch_size=32),
    transport=Transport(queue_batches=2),
  )


def paper_atari_deep() -> Config:
  """Atari, one game, deep network (no LSTM), 200 M frames."""
  return dataclasses.replace(
    paper_atari_shallow(),
    name='paper_atari_deep',
    network=Network(torso='deep', hidden=256, frame_stack=4),
  )


def paper_dmlab_level() -> Config:
  """One DeepMind Lab level: deep network with LSTM, 96x72 RGB, unrolls of 100."""
  return Config(
    name='paper_dmlab_level',
    environment=Environment(suite='dmlab', levels=('rooms_watermaze',)),
    network=Network(
      torso='deep',
      hidden=256,
      lstm=256,
      frame_stack=1,
      last_action_reward=True,
      instructions=True,
    ),
    loss=Loss(entropy_cost=0.00334),
    optimizer=Optimizer(learning_rate=4.8e-4, epsilon=0.1, max_grad_norm=0.0),
    actor=Actor(num_actors=48, envs_per_actor=4, unroll_length=100),
    learner=Learner(batch_size=32, total_frames=1_000_000_000),
  )


def dmlab30() -> Config:
  """DMLab-30, all levels as one agent, with the settings of the paper's release.

  Actors are for one machine; a cluster says `--num_actors`. The paper's single-task
  learning rates differ, see `paper_dmlab_level`.
  """
  base = paper_dmlab_level()
  return dataclasses.replace(
    base,
    name='dmlab30',
    environment=dataclasses.replace(base.environment, levels=('dmlab30',)),
    loss=Loss(entropy_cost=0.00334, reward_clipping='soft_asymmetric'),
    optimizer=Optimizer(learning_rate=3.19e-4, epsilon=0.1, max_grad_norm=0.0),
    actor=Actor(num_actors=4, envs_per_actor=8, unroll_length=100),
    learner=Learner(batch_size=32, total_frames=10_000_000_000),
    evaluator=Evaluator(interval=3600.0, episodes=1, video=False),
  )


def doom() -> Config:
  """Nine scenarios of ViZDoom as one agent, on two cores."""
  return Config(
    name='doom',
    environment=Environment(suite='doom', levels=('doom9',)),
    network=Network(
      torso='shallow', hidden=256, lstm=256, frame_stack=1, last_action_reward=True
    ),
    loss=Loss(entropy_cost=0.02),
    optimizer=Optimizer(name='adam', learning_rate=2e-4, epsilon=1e-5),
    actor=Actor(num_actors=1, envs_per_actor=18),
    learner=Learner(batch_size=8, total_frames=30_000_000),
    evaluator=Evaluator(interval=600.0),
  )


def benchmark_shallow() -> Config:
  """What the end-to-end benchmark runs beside its peers: nature network, 512."""
  return Config(
    name='benchmark_shallow',
    network=Network(torso='nature', hidden=512),
    learner=Learner(batch_size=32, total_frames=10_000_000),
    evaluator=Evaluator(enabled=False),
  )


def benchmark_deep() -> Config:
  """The same with the deep network."""
  return dataclasses.replace(
    benchmark_shallow(),
    name='benchmark_deep',
    network=Network(torso='deep', hidden=256),
  )


_CONFIGS: tuple[Callable[[], Config], ...] = (
  small,
  pong,
  catch,
  paper_atari_shallow,
  paper_atari_deep,
  paper_dmlab_level,
  dmlab30,
  doom,
  benchmark_shallow,
  benchmark_deep,
)


def names() -> list[str]:
  return [f.__name__ for f in _CONFIGS]


def get(name: str) -> Config:
  """Raises `ConfigError` for an unknown name, with those that are near."""
  for make in _CONFIGS:
    if make.__name__ == name:
      return make()
  near = difflib.get_close_matches(name, names(), 2)
  hint = f'; did you mean {" or ".join(near)}?' if near else ''
  raise config_lib.ConfigError(
    f'--config={name!r} is unknown: must be one of {", ".join(names())}{hint}'
  )
