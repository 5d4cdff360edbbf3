"""The suite `doom`: nine scenarios of ViZDoom as tasks of one agent.

It needs nothing but `pip install vizdoom`, and has what DMLab-30 has: first-person
frames, one set of actions, engines in processes of their own, levels whose rewards
differ by orders of magnitude, and a score of the whole suite.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from impala_jax import config as config_lib
from impala_jax import types
from impala_jax.environments import base, level_names, registry, scoring
from impala_jax.environments import engine_settings as engines
from impala_jax.environments.doom import environment as doom
from impala_jax.environments.engines import pool as process_pool
from impala_jax.settings import KEPT, at_least, at_most, below, one_of, setting

GROUP = 'doom9'  # Among `environment.levels`: all scenarios.
NOT_INSTALLED = (
  'ViZDoom (the Python module vizdoom) is not installed here; get it with: '
  "pip install 'vizdoom==1.3.2'"
)


class Scenario(NamedTuple):
  """What the suite adds to a scenario.

  Attributes:
    random: mean return of random play (each of the nine actions with the same
      probability, action repeat 4), which scores 0.
    reference: the return that scores 100; see `SCENARIOS`.
    scale: agents see the scenario's reward times this, so that all scenarios have
      rewards of one size and clipping to [-1, 1] loses next to nothing. `EpisodeEnd`
      and all figures count the scenario's own.
    time_limit: tics, where the scenario itself has none; 35 are a second.
  """

  random: float
  reference: float
  scale: float = 1.0
  time_limit: int = 0


# `random`: means of 200 episodes, by
#   python -m experiments.benchmarks.doom_benchmark --episodes=200
# `reference`: unless said otherwise, what no play exceeds by the rules of the scenario.
# It is nobody's score: neither a person's nor an agent's.
SCENARIOS = {
  # 106 for the kill, less 5 for one shot; each tic costs 1.
  'basic': Scenario(-211.89, 101.0, 0.01),
  # 1,280 units of way to the vest, and 1,000 for the vest.
  'deadly_corridor': Scenario(-31.34, 2280.0, 0.01),
  # A kill with each of 26 rounds, and alive at the time limit.
  'defend_the_center': Scenario(-0.21, 26.0),
  # Its monsters come back for ever, so no rule bounds it. This is the best of 60
  # episodes (their mean is 17) of a script that the engine tells where monsters are
  # on the screen, and that turns to one and shoots.
  'defend_the_line': Scenario(6.17, 33.0, time_limit=2100),
  # 1 for each of 2,100 tics, alive at the end; so are the next and `take_cover`.
  'health_gathering': Scenario(368.96, 2100.0, 0.01),
  'health_gathering_supreme': Scenario(311.27, 2100.0, 0.01),
  # 1 for the goal, less what the time costs.
  'my_way_home': Scenario(-0.082, 1.0),
  'predict_position': Scenario(0.013, 1.0),
  'take_cover': Scenario(232.16, 2100.0, 0.01, time_limit=2100),
}


@dataclass(frozen=True)
class Settings(engines.EngineSettings):
  """What scenarios are played with."""

  action_set: str = setting(
    'default', 'The agent has this set of actions.', one_of(doom.ACTIONS), kept=KEPT
  )
  action_repeat: int = setting(
    4,
    'An action lasts so many game tics. 35 are a second of game time.',
    at_least(1),
    at_most(1000),
  )
  frame_width: int = setting(
    96, 'A frame is so many pixels wide.', at_least(1), at_most(4096), kept=KEPT
  )
  frame_height: int = setting(
    72, 'A frame is so many pixels high.', at_least(1), at_most(4096), kept=KEPT
  )
  max_episode_frames: int = setting(
    108_000,
    'An episode is ended after so many game tics, or by a shorter limit of its '
    'scenario.',
    at_least(1),
    below(2**31),
  )

  def relations(self) -> Iterator[tuple[str, str]]:
    allowed = doom.size_problem(self.frame_width, self.frame_height)
    if allowed:
      yield 'frame_width', f'with doom.frame_height {self.frame_height} they {allowed}'


def problem(level: str) -> str | None:
  """What is wrong with a level, or None."""
  if level in SCENARIOS:
    return None
  if level == GROUP:
    return f'{GROUP!r} is a group of levels: registry.resolve writes them out'
  near = level_names.near(level, [GROUP, *SCENARIOS]) or SCENARIOS
  return f'unknown level {level!r}: did you mean {", ".join(near)}?'


def spec(config: config_lib.Config) -> types.EnvironmentSpec:
  """Of all scenarios, without an engine."""
  settings = config.of_suite(Settings)
  shape = (settings.frame_height, settings.frame_width, 3)
  return types.EnvironmentSpec(
    {'frame': types.ArraySpec(shape, np.dtype(np.uint8))},
    len(doom.ACTIONS[settings.action_set]),
  )


def resolve(config: config_lib.Config) -> config_lib.Config:
  """Writes out the group.

  Raises:
    config.ConfigError: see `spec`.
  """
  levels: list[str] = []
  for level in config.environment.levels:
    levels.extend(SCENARIOS if level == GROUP else [level])
  distinct = tuple(dict.fromkeys(levels))  # A level may be named beside its group.
  return replace(config, environment=replace(config.environment, levels=distinct))


def missing() -> str:
  """How to get the engine, empty where it is installed."""
  return NOT_INSTALLED if importlib.util.find_spec('vizdoom') is None else ''


def reference(level: str) -> scoring.Reference | None:
  """What is known of a scenario; None for a level that is none of the suite."""
  row = SCENARIOS.get(level)
  if row is None:
    return None
  return scoring.Reference(level, row.random, row.reference, 'reference')


def scores(mean_returns: Mapping[str, float]) -> dict[str, float]:
  """Figures of the suite by name: never an error.

  With all nine levels `mean_capped`, where each counts for at most 100, and
  `mean_uncapped`, as they are computed for DMLab-30, but of other reference returns.
  With fewer, `partial_mean_capped` over those that are there, and their number,
  `partial_levels`. Other levels do not count.
  """
  known = [(reference(level), mean) for level, mean in mean_returns.items()]
  by_level = [known.score(mean) for known, mean in known if known is not None]
  found = [score for score in by_level if score is not None]
  return scoring.of_suite(found, len(SCENARIOS))


class DoomPool:
  """A `ProcessPool` of scenarios; episodes have the returns of the scenarios' rewards.

  Args:
    config: the run, resolved.
    tasks: of each environment, an index into `environment.levels`.
    max_ready: see `ProcessPool`.
    film: the engines also make pictures, for `frame`.
    evaluation: an engine that fails too often has no other level to play.
  """

  def __init__(
    self,
    config: config_lib.Config,
    tasks: Sequence[int],
    max_ready: int = 0,
    film: bool = False,
    evaluation: bool = False,
  ):
    settings, levels = config.of_suite(Settings), config.environment.levels
    self.spec = spec(config)
    made = self.spec
    if film:
      picture = types.ArraySpec(doom.PICTURE_SHAPE, np.dtype(np.uint8))
      made = made._replace(observation={**made.observation, 'picture': picture})
    engines = [_engine(settings, level, film) for level in levels]
    self._pool = process_pool.ProcessPool(
      [engines[task] for task in tasks],
      tasks,
      made,
      others=None if evaluation else dict(enumerate(engines)),
      max_ready=max_ready,
      step_timeout=settings.step_timeout,
      reset_timeout=settings.reset_timeout,
      max_restarts=settings.engine_restarts,
    )
    self._scales = [SCENARIOS[level].scale for level in levels]
    self._picture: np.ndarray | None = None
    self.num_envs = self._pool.num_envs
    self.task_ids = self._pool.task_ids

  def reset(self, seed: int) -> None:
    self._pool.reset(seed)

  def send(self, env_ids: np.ndarray, actions: np.ndarray) -> None:
    self._pool.send(env_ids, actions)

  def recv(self, timeout: float) -> base.Ready:
    ready = self._pool.recv(timeout)
    observation = dict(ready.timestep.observation)
    pictures = observation.pop('picture', None)
    if pictures is not None:
      self._picture = pictures[-1]
    return ready._replace(
      timestep=ready.timestep._replace(observation=observation),
      episodes=[
        e._replace(episode_return=e.episode_return / self._scales[e.task_id])
        for e in ready.episodes
      ],
    )

  def frame(self) -> np.ndarray | None:
    """The large picture of the last time step, uint8 [480, 640, 3].

    With more than one environment, that of any of them. None before the first, and
    where nothing is filmed.
    """
    return self._picture

  def stats(self) -> dict[str, Any]:
    return self._pool.stats()

  def counts(self) -> dict[str, float]:
    return self._pool.counts()

  def close(self) -> None:
    self._pool.close()


def _engine(settings: Settings, level: str, film: bool) -> process_pool.EngineSpec:
  limits = [SCENARIOS[level].time_limit, settings.max_episode_frames]
  return process_pool.EngineSpec(
    maker='impala_jax.environments.doom.environment:make',
    kwargs={
      'level': level,
      'action_set': settings.action_set,
      'action_repeat': settings.action_repeat,
      'time_limit': min(x for x in limits if x),
      'width': settings.frame_width,
      'height': settings.frame_height,
      'reward_scale': SCENARIOS[level].scale,
      'picture': film,
    },
    name=f'doom level {level}',
    # For one that is killed before it could remove them itself.
    shared_memory=doom.SHARED_PREFIXES,
  )


SUITE = registry.Suite(
  make=lambda config, tasks, evaluation: DoomPool(
    config,
    tasks,
    0 if evaluation else config.actor.inference_batch,
    evaluation=evaluation,
  ),
  spec=spec,
  problem=problem,
  scene=lambda config, task: DoomPool(config, [task], film=True, evaluation=True),
  resolve=resolve,
  scores=scores,
  reference=reference,
  settings=Settings,
  missing=missing,
  levels=lambda: [GROUP, *SCENARIOS],
)
