"""From a configuration to environments.

A suite is a family of levels, perhaps with settings of its own. Known are those that
`suites` lists, whatever was registered in this process, and
`some_package.some_module:attribute`, which every process of a run can import by itself;
the attribute is what `register` takes.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import dm_env
import numpy as np

from impala_jax import config as config_lib
from impala_jax import settings as settings_lib
from impala_jax import suites, types
from impala_jax.environments import base, level_names, scoring, specs, vector
from impala_jax.environments import engine_settings as engines


class Scene(base.VectorEnvironment, Protocol):
  """One environment that plays whole games, with its picture."""

  def frame(self) -> np.ndarray | None:
    """The picture of the last time step, uint8 [H, W, 3]; None without one."""


class Suite(NamedTuple):
  """A family of levels that brings its own vector environment."""

  # Configuration, task of each environment (an index into `environment.levels`),
  # whether to play whole games as for evaluation.
  make: Callable[[config_lib.Config, Sequence[int], bool], base.VectorEnvironment]
  spec: Callable[[config_lib.Config], types.EnvironmentSpec]
  # What is wrong with a level, or None. Levels are not checked where this is None.
  problem: Callable[[str], str | None] | None = None
  # One environment of a task that plays whole games and is filmed, or None.
  scene: Callable[[config_lib.Config, int], Scene | None] | None = None
  # Whether the suite can be run here as configured: the configuration with names of
  # groups of levels written out, and with levels that lack their data left out if
  # that was asked for. Raises ConfigError that says what is missing and how to get it.
  resolve: Callable[[config_lib.Config], config_lib.Config] | None = None
  # Mean return by level -> figures of the whole suite by name ('human_normalised',
  # ...), in the order in which a person wants them. May need all levels of the suite:
  # empty where some are missing.
  scores: Callable[[Mapping[str, float]], dict[str, float]] | None = None
  # What is known of a level beforehand; None for a level that is not of the suite.
  reference: Callable[[str], scoring.Reference | None] | None = None
  # A frozen dataclass of `settings.setting`s, which the suite takes from a
  # configuration by `config.of_suite`. Its field `action_repeat`, where there is one,
  # says how many frames an agent step is; without it, it is one.
  settings: type[settings_lib.Section] | None = None
  # Why levels of a resolved configuration cannot be played on this machine, as far as
  # it can be told without an engine: a line each.
  lacking: Callable[[config_lib.Config], list[str]] | None = None
  # Whether an episode's end tells if it was a time limit's doing.
  tells_time_limits: bool = True
  # What has to be installed for it and how, empty where all is there.
  missing: Callable[[], str] | None = None
  # The levels that `environment.levels` may name, groups of them first. None: any.
  levels: Callable[[], Sequence[str]] | None = None


# Makes one environment: `make(level, seed=...)`.
EnvironmentMaker = Callable[..., dm_env.Environment]


def register(
  name: str,
  suite: Suite | EnvironmentMaker,
  levels: Sequence[str] | None = None,
  settings: type[settings_lib.Section] | None = None,
) -> None:
  """Makes `environment.suite = name` known in this process.

  Args:
    name: the name; registering it again replaces it. It is also the section of the
      suite's settings: `--set name.field=value`.
    suite: a `Suite`, or a function `make(level, seed=...)` that returns a
      `dm_env.Environment`. All levels must agree in their specs.
    levels: the levels that exist, None to take any name (not with a `Suite`).
    settings: see `Suite.settings` (not with a `Suite`, which has its own). The function
      gets them as `make(level, seed=..., settings=...)`.

  Raises:
    ValueError: `name` is a section of every configuration, or empty.
    TypeError: the settings are not made of `settings.setting`s.
  """
  if not name or name in settings_lib.kinds(config_lib.Config):
    raise ValueError(f'name is {name!r}: must be no section of a configuration')
  made = suite if isinstance(suite, Suite) else from_maker(suite, levels, settings)
  if made.settings is not None:
    settings_lib.check_class(made.settings)
  suites.register(name, made)


def missing(name: str) -> str:
  """What has to be installed for a suite and how, empty where all is there."""
  suite = find(name)
  return suite.missing() if suite.missing is not None else ''


def levels(name: str) -> tuple[str, ...]:
  """The levels of a suite; none where it takes any name, or is not installed."""
  suite = find(name)
  try:
    return tuple(suite.levels()) if suite.levels is not None else ()
  except ImportError:
    return ()


def make_vector(
  config: config_lib.Config,
  actor_id: int = 0,
  *,
  evaluation: bool = False,
  num_envs: int | None = None,
  level: str | None = None,
  tasks: Sequence[int] | None = None,
) -> base.VectorEnvironment:
  """The environments of one actor, or of an evaluator.

  Levels are dealt round robin over all environments of all actors: environment j
  of actor i plays level (i * envs_per_actor + j) % len(levels).

  Args:
    config: the run.
    actor_id: i.
    evaluation: play whole games: no episode ends at a lost life. Each `recv`
      returns all environments.
    num_envs: default `actor.envs_per_actor`.
    level: all environments play this one, which must be among the configured.
    tasks: index of the level of each environment, instead of the two above.

  Raises:
    config.ConfigError: the suite or a level is unknown.
  """
  check(config)
  count = config.actor.envs_per_actor if num_envs is None else num_envs
  levels = config.environment.levels
  if tasks is not None:
    tasks = list(tasks)
  elif level is not None:
    tasks = [_task(config, level)] * count
  else:
    start = actor_id * config.actor.envs_per_actor
    tasks = [(start + j) % len(levels) for j in range(count)]
  return find(config.environment.suite).make(config, tasks, evaluation)


def make_scene(config: config_lib.Config, level: str) -> Scene | None:
  """One environment that plays whole games and is filmed; None where none can be.

  Raises:
    config.ConfigError: the suite or the level is unknown.
  """
  check(config)
  task = _task(config, level)
  scene = find(config.environment.suite).scene
  return None if scene is None else scene(config, task)


def environment_spec(config: config_lib.Config) -> types.EnvironmentSpec:
  """What the network must know, without making an actor's environments.

  Raises:
    config.ConfigError: the suite or a level is unknown.
  """
  check(config)
  return find(config.environment.suite).spec(config)


def check(config: config_lib.Config) -> None:
  """Judges what concerns the suite alone.

  Raises:
    config.ConfigError: lists every level that does not exist, and every impossible
      setting of the suite.
  """
  found = config_lib.suite_problems(config) + _level_problems(config)
  if found:
    raise config_lib.ConfigError('\n'.join(found))


def resolve(config: config_lib.Config, elsewhere: bool = False) -> config_lib.Config:
  """The configuration as it can be run; for launchers, before anything starts.

  Groups of levels become their levels, and levels that lack their data are left out
  where the suite has a setting that says so. Impossible settings of the suite are for
  `config.validate` to name with all others, unless something is missing here.

  Args:
    config: the run.
    elsewhere: it is run by other machines, so the suite need not be installed here.

  Raises:
    config.ConfigError: what is missing, and how to get it; levels that do not exist.
  """
  suite = find(config.environment.suite)
  if not elsewhere and (text := missing(config.environment.suite)):
    raise config_lib.ConfigError(text)
  settings_lib.check(config.environment, 'environment.')
  found = []
  try:
    if suite.resolve is not None:
      config = suite.resolve(config)
    # Some suites ask their engine which levels there are.
    with contextlib.suppress(*([ImportError] if elsewhere else [])):
      found = _level_problems(config)
      if suite.lacking is not None and not found and not elsewhere:
        found = suite.lacking(config)
  except config_lib.ConfigError as e:
    found = [str(e)]
  if found:
    raise config_lib.ConfigError('\n'.join(config_lib.suite_problems(config) + found))
  return config


def engine_settings(config: config_lib.Config) -> engines.EngineSettings:
  """How long engines of the run's suite may take; defaults where it does not say."""
  section = config.suite_section
  if isinstance(section, engines.EngineSettings):
    return section
  return engines.EngineSettings()


def scores(
  config: config_lib.Config, mean_returns: Mapping[str, float]
) -> dict[str, float]:
  """Figures of the whole suite by name, from the mean return of each level.

  Empty where the suite has none, or where it needs levels that are missing.
  """
  suite = find(config.environment.suite)
  return {} if suite.scores is None else suite.scores(mean_returns)


def reference(suite: str, level: str) -> scoring.Reference:
  """What is known beforehand of one of `environment.levels`: perhaps just its name."""
  try:
    known = find(suite).reference
  except config_lib.ConfigError:  # A run's own environment, which is not here.
    known = None
  return (known and known(level)) or scoring.Reference(level)


def tells_time_limits(suite: str) -> bool:
  """Whether `EpisodeEnd.truncated` means something in a suite."""
  try:
    return find(suite).tells_time_limits
  except config_lib.ConfigError:  # A run's own environment, which is not here.
    return True


def random_seed(seed: int, actor_id: int, incarnation: int = 0) -> int:
  """In [0, 2^31): differs between actors, and each time that one restarts."""
  draw = np.random.SeedSequence([seed, actor_id, incarnation]).generate_state(1)
  return int(draw[0]) % 2**31


def _level_problems(config: config_lib.Config) -> list[str]:
  problem = find(config.environment.suite).problem
  levels = [problem(x) for x in config.environment.levels] if problem else []
  return [x for x in levels if x]


def _task(config: config_lib.Config, level: str) -> int:
  levels = config.environment.levels
  if level not in levels:
    raise config_lib.ConfigError(
      f'level is {level!r}: must be one of environment.levels, {", ".join(levels)}'
    )
  return levels.index(level)


def find(name: str) -> Suite:
  """Raises `config.ConfigError`: the suite is unknown."""
  found = suites.find(name)
  return found if isinstance(found, Suite) else from_maker(found)


def from_maker(
  maker: EnvironmentMaker,
  levels: Sequence[str] | None = None,
  settings: type[settings_lib.Section] | None = None,
) -> Suite:
  """A suite of single environments; see `register` for the arguments."""

  def problem(level: str) -> str | None:
    assert levels is not None
    if level in levels:
      return None
    near = level_names.near(level, levels) or levels
    return f'unknown level {level!r}: did you mean {", ".join(near)}?'

  def make(
    config: config_lib.Config, tasks: Sequence[int], evaluation: bool
  ) -> vector.SequentialVector:
    return vector.SequentialVector(
      [functools.partial(_make, maker, settings, config, t) for t in tasks],
      tasks,
      max_ready=0 if evaluation else config.actor.inference_batch,
    )

  def scene(config: config_lib.Config, task: int) -> Scene | None:
    made = make(config, [task], True)
    made.reset(0)  # Some environments have no picture before.
    made.recv(0.0)
    if made.frame() is not None:
      return made
    made.close()
    return None

  def spec(config: config_lib.Config) -> types.EnvironmentSpec:
    environment = _make(maker, settings, config, 0, seed=0)
    try:
      return specs.environment_spec(environment)
    finally:
      environment.close()

  return Suite(
    make=make,
    spec=spec,
    problem=None if levels is None else problem,
    scene=scene,
    settings=settings,
    levels=None if levels is None else lambda: levels,
  )


def _make(
  maker: EnvironmentMaker,
  settings: type[settings_lib.Section] | None,
  config: config_lib.Config,
  task: int,
  *,
  seed: int,
) -> dm_env.Environment:
  level = config.environment.levels[task]
  if settings is None:
    return maker(level, seed=seed)
  return maker(level, seed=seed, settings=config.of_suite(settings))
