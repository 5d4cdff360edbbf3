"""The suite `atari`: games by name, in the native threads of ale-py."""

from collections.abc import Sequence

from impala_jax import config as config_lib
from impala_jax.environments import base, concat_vector, registry
from impala_jax.environments.atari import environment as atari
from impala_jax.environments.atari import games as atari_games
from impala_jax.environments.atari import video as atari_video


def _full_actions(config: config_lib.Config) -> bool:
  settings = config.environment
  return settings.full_action_space or len(settings.levels) > 1


def _settings(config: config_lib.Config) -> dict:
  return {
    'action_repeat': config.environment.action_repeat,
    'sticky_actions': config.environment.sticky_actions,
    'max_episode_frames': config.environment.max_episode_frames,
    'full_action_space': _full_actions(config),
  }


def _vector(
  config: config_lib.Config, tasks: Sequence[int], evaluation: bool
) -> base.VectorEnvironment:
  batch = 0 if evaluation else config.actor.inference_batch
  threads = max(1, config.actor.env_threads // len(set(tasks)))
  return concat_vector.by_task(
    tasks,
    lambda task, count: atari.AtariVector(
      config.environment.levels[task],
      count,
      task_id=task,
      episodic_life=config.environment.episodic_life and not evaluation,
      env_threads=threads,
      inference_batch=batch if batch < count else 0,
      **_settings(config),
    ),
    max_ready=batch,
  )


SUITE = registry.Suite(
  make=_vector,
  spec=lambda c: atari.spec(c.environment.levels[0], _full_actions(c)),
  problem=atari_games.problem,
  scene=lambda c, task: atari_video.AtariVideo(
    c.environment.levels[task], task_id=task, **_settings(c)
  ),
)
