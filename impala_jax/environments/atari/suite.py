"""The suite `atari`: games by name, in the native threads of ale-py."""

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

from impala_jax import config as config_lib
from impala_jax.environments import base, concat_vector, registry
from impala_jax.environments.atari import environment as atari
from impala_jax.environments.atari import games as atari_games
from impala_jax.environments.atari import video as atari_video
from impala_jax.settings import KEPT, NOT_NEGATIVE, at_least, at_most, below, setting


@dataclasses.dataclass(frozen=True)
class Settings:
  """How games are played; the arguments of `AtariVector` of the same names."""

  action_repeat: int = setting(
    4, 'An action lasts so many frames.', at_least(1), at_most(1000)
  )
  episodic_life: bool = setting(
    True,
    'In training a lost life ends an episode. In evaluation it never does.',
  )
  sticky_actions: float = setting(
    0.0,
    'In each frame the last action is repeated with this probability.',
    NOT_NEGATIVE,
    below(1, 'or no action would ever be taken'),
  )
  noop_max: int = setting(
    30,
    'A game begins with 0 to so many frames without action, drawn at random.',
    NOT_NEGATIVE,
    at_most(100_000),
  )
  max_episode_frames: int = setting(
    108_000, 'A game is ended after so many frames.', at_least(1), below(2**31)
  )
  full_action_space: bool = setting(
    False,
    'The agent has all 18 actions, not just those that a game knows. It always has '
    'where it plays several games.',
    kept=KEPT,
  )

  def relations(self) -> Iterator[tuple[str, str]]:
    if self.max_episode_frames < self.action_repeat:
      allowed = f'must be at least atari.action_repeat ({self.action_repeat})'
      yield 'max_episode_frames', allowed


NOT_INSTALLED = (
  'the Atari games (the Python module ale_py) are not installed here; get them with: '
  "pip install 'ale-py>=0.11' 'gymnasium>=1.1'"
)


def _missing() -> str:
  return NOT_INSTALLED if importlib.util.find_spec('ale_py') is None else ''


def _full_actions(config: config_lib.Config) -> bool:
  several = len(config.environment.levels) > 1
  return config.of_suite(Settings).full_action_space or several


def _arguments(config: config_lib.Config, evaluation: bool) -> dict[str, Any]:
  settings = config.of_suite(Settings)
  return {
    **dataclasses.asdict(settings),
    'episodic_life': settings.episodic_life and not evaluation,
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
      env_threads=threads,
      inference_batch=batch if batch < count else 0,
      **_arguments(config, evaluation),
    ),
    max_ready=batch,
  )


SUITE = registry.Suite(
  make=_vector,
  spec=lambda c: atari.spec(c.environment.levels[0], _full_actions(c)),
  problem=atari_games.problem,
  scene=lambda c, task: atari_video.AtariVideo(
    c.environment.levels[task], task_id=task, **_arguments(c, evaluation=True)
  ),
  settings=Settings,
  missing=_missing,
  levels=atari_games.games,
)
