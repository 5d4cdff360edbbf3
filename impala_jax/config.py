"""One configuration object: a notebook, a local run and a cluster run share it.

Frozen dataclasses whose fields say what they mean and may be, see `settings`. What
several fields must be together stands in `relations` of their section, across sections
in `validate`. Named configurations are in `configs`.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from impala_jax import settings, suites, types
from impala_jax.settings import (
  DISTINCT,
  KEPT,
  KEPT_ZERO_OR_NOT,
  MAY_BE_INFINITE,
  NOT_EMPTY,
  NOT_NEGATIVE,
  POSITIVE,
  at_least,
  at_most,
  below,
  one_of,
  setting,
  within,
)

ConfigError = settings.ConfigError

TORSOS = ('shallow', 'deep', 'nature', 'mlp')
OPTIMIZERS = ('rmsprop', 'adam')
SCHEDULES = ('linear', 'constant')
TRANSPORTS = ('reverb', 'tcp', 'local')
DTYPES = ('float32', 'bfloat16')
PLATFORMS = ('auto', 'cpu', 'gpu', 'tpu')

S = TypeVar('S', bound=settings.Section)

_PART_OF_A_PATH = settings.Constraint(
  'must be 1 to 100 printable characters without a slash, and not begin with a dot',
  lambda x: (
    0 < len(x) <= 100 and x.isprintable() and '/' not in x and not x.startswith('.')
  ),
)
# Bytes that no process of a run has room for.
_TOO_MUCH = 2**40
_PARAMETER_BYTES = 4 * 5  # As they are, as gradients and in the optimizer's memory.
_FEATURES = 32  # Of a torso, at least.
_LEAST_STEP = 16  # Bytes of a time step, whatever is observed.


@dataclasses.dataclass(frozen=True)
class Environment:
  """Which levels are played. How they are played is for the suite's settings to say."""

  suite: str = setting(
    'atari',
    'The levels are of this suite: a registered name, or package.module:attribute.',
    kept=KEPT,
  )
  levels: tuple[str, ...] = setting(
    ('breakout',),
    'These tasks are played. Several make one multi-task agent.',
    NOT_EMPTY,
    DISTINCT,
    kept=KEPT,
  )


@dataclasses.dataclass(frozen=True)
class Network:
  """The agent's network, see `agents.networks`."""

  torso: str = setting(
    'nature',
    'This stack of layers turns an observation into features.',
    one_of(TORSOS),
    kept=KEPT,
  )
  hidden: int = setting(
    512,
    'The linear layer after the torso has so many units.',
    at_least(1),
    kept=KEPT,
  )
  lstm: int = setting(
    0, 'The LSTM has so many units. With 0 there is none.', NOT_NEGATIVE, kept=KEPT
  )
  frame_stack: int = setting(
    4,
    'The network sees so many frames at once. Each travels once.',
    at_least(1),
    at_most(256),
    kept=KEPT,
  )
  last_action_reward: bool = setting(
    False, 'The network is also given the last action and reward.', kept=KEPT
  )
  instructions: bool = setting(
    False, 'The network also reads a text observation.', kept=KEPT
  )
  dtype: str = setting(
    'float32',
    'The torso computes in this type. Heads and loss always compute in float32.',
    one_of(DTYPES),
  )


@dataclasses.dataclass(frozen=True)
class Loss:
  """The loss of an unroll, see `losses.make_loss`."""

  discount: float = setting(
    0.99, 'A reward is worth so much of itself one agent step earlier.', within(0, 1)
  )
  baseline_cost: float = setting(
    0.5, 'The squared error of the values has this weight.', NOT_NEGATIVE
  )
  entropy_cost: float = setting(
    0.01, 'The entropy of the policy is rewarded with this weight.', NOT_NEGATIVE
  )
  correction: str = setting(
    'vtrace',
    'So it is made good that an older policy acted, see `vtrace.vtrace`.',
    one_of(types.CORRECTIONS),
  )
  rho_clip: float = setting(
    1.0,
    'The importance weights of temporal differences are clipped to this.',
    NOT_NEGATIVE,
    MAY_BE_INFINITE,
  )
  c_clip: float = setting(
    1.0,
    'The importance weights that carry differences back in time are clipped to this.',
    NOT_NEGATIVE,
    MAY_BE_INFINITE,
  )
  pg_rho_clip: float = setting(
    1.0,
    'The importance weights of the policy gradient are clipped to this.',
    NOT_NEGATIVE,
    MAY_BE_INFINITE,
  )
  trace_lambda: float = setting(
    1.0, 'It mixes targets of n steps (1) with those of one step (0).', within(0, 1)
  )
  reward_clipping: str = setting(
    'abs_one',
    'Rewards are so bounded where the learner learns from them, see '
    '`losses.clip_rewards`. The figures of a run count them as they were.',
    one_of(types.REWARD_CLIPPING),
  )
  vtrace_method: str = setting(
    'auto',
    'The recursion is computed so. The methods differ in rounding alone.',
    one_of(types.VTRACE_METHODS),
  )

  def relations(self) -> Iterator[tuple[str, str]]:
    if self.c_clip > self.rho_clip:
      yield 'c_clip', f'must not exceed loss.rho_clip ({self.rho_clip})'


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Losses are sums over time and batch; learning rates assume that."""

  name: str = setting(
    'rmsprop', 'Updates follow this rule.', one_of(OPTIMIZERS), kept=KEPT
  )
  learning_rate: float = setting(
    6e-4, 'The first update has this learning rate.', POSITIVE
  )
  schedule: str = setting(
    'linear',
    'The learning rate falls to 0 at learner.total_frames, or stays.',
    one_of(SCHEDULES),
  )
  decay: float = setting(
    0.99,
    "RMSProp's running mean of squared gradients decays by this.",
    NOT_NEGATIVE,
    below(1, 'or it would never learn of a gradient'),
  )
  momentum: float = setting(
    0.0,
    'RMSProp has this momentum.',
    NOT_NEGATIVE,
    below(1, 'or its steps would only grow'),
    kept=KEPT_ZERO_OR_NOT,
  )
  epsilon: float = setting(
    0.01,
    'It bounds the steps of small gradients. RMSProp adds it inside the square root, '
    'Adam outside.',
    POSITIVE,
  )
  adam_b1: float = setting(
    0.9,
    "Adam's running mean of gradients decays by this.",
    NOT_NEGATIVE,
    below(1, 'or it would divide by 0'),
  )
  adam_b2: float = setting(
    0.999,
    "Adam's running mean of squared gradients decays by this.",
    NOT_NEGATIVE,
    below(1, 'or it would divide by 0'),
  )
  max_grad_norm: float = setting(
    40.0,
    'Longer gradients are scaled down to this global norm. With 0 none are.',
    NOT_NEGATIVE,
    MAY_BE_INFINITE,
    kept=KEPT_ZERO_OR_NOT,
  )


@dataclasses.dataclass(frozen=True)
class Actor:
  """The actors, and where they run their policy."""

  num_actors: int = setting(
    1,
    'There are so many actors: processes, or threads of one process.',
    at_least(1),
    at_most(1_000_000),
  )
  envs_per_actor: int = setting(
    32, 'Each actor plays so many environments.', at_least(1)
  )
  unroll_length: int = setting(20, 'An unroll has so many agent steps.', at_least(1))
  inference_batch: int = setting(
    0,
    "A policy call is for so many environments. With 0 it is for all of an actor's.",
    NOT_NEGATIVE,
  )
  env_threads: int = setting(
    1,
    "So many native threads step an actor's environments.",
    at_least(1),
    at_most(4096),
  )
  send_logits: bool = setting(False, 'The logits of the behaviour policy travel, too.')
  platform: str = setting(
    'auto',
    "An actor runs its own policy there. 'auto' is the CPU for an actor that is a "
    "process, and the learner's device for one that is a thread.",
    one_of(PLATFORMS),
  )

  def relations(self) -> Iterator[tuple[str, str]]:
    if self.inference_batch > self.envs_per_actor:
      allowed = f'must not exceed actor.envs_per_actor ({self.envs_per_actor})'
      yield 'inference_batch', allowed


@dataclasses.dataclass(frozen=True)
class Inference:
  """Servers that run the policy for the actors, in place of policies of their own."""

  servers: int = setting(
    0,
    'There are so many server processes, to which actors are dealt in turn. With 0 '
    'each actor runs its own policy.',
    NOT_NEGATIVE,
  )
  max_batch: int = setting(
    256,
    'A policy call is for at most so many environments.',
    at_least(1),
    at_most(2**20),
  )
  deadline_ms: float = setting(
    2.0,
    'The oldest request waits so many milliseconds for more to come.',
    NOT_NEGATIVE,
    at_most(10_000, 'or actors would take the server to be gone'),
  )
  max_environments: int = setting(
    0,
    'One server has room for so many environments. With 0 it has room for twice those '
    'dealt to it, so that it can stand in for another.',
    NOT_NEGATIVE,
    at_most(2**24),
  )
  platform: str = setting(
    'auto',
    "The servers compute on this. 'auto' is what JAX takes on their hosts.",
    one_of(PLATFORMS),
  )


@dataclasses.dataclass(frozen=True)
class Learner:
  """The updates, and what the learner publishes and keeps."""

  batch_size: int = setting(
    32, 'An update takes so many unrolls, over all devices.', at_least(1)
  )
  total_frames: int = setting(
    200_000_000, 'The run ends after so many frames.', at_least(1)
  )
  publish_interval: int = setting(
    1, 'Parameters are published once in so many updates.', at_least(1)
  )
  max_policy_lag: int = setting(
    0,
    'Unrolls whose parameters are more updates old than this are refused. With 0 '
    'none are.',
    NOT_NEGATIVE,
  )
  metrics_interval: float = setting(
    2.0, 'So many seconds pass between two metrics records.', POSITIVE
  )
  checkpoint_interval: float = setting(
    60.0, 'So many seconds pass between two checkpoints.', POSITIVE
  )
  keep_checkpoints: int = setting(
    3, 'So many of the newest checkpoints are kept.', at_least(1)
  )
  num_devices: int = setting(
    0,
    "A learner process uses so many of its host's devices. With 0 it uses all.",
    NOT_NEGATIVE,
  )


@dataclasses.dataclass(frozen=True)
class Transport:
  """How unrolls travel."""

  kind: str = setting(
    'reverb',
    "Unrolls travel between processes by Reverb, or by TCP alone ('tcp'), or within "
    "one process ('local').",
    one_of(TRANSPORTS),
  )
  queue_batches: int = setting(
    2, 'The queue holds so many batches of unrolls.', at_least(1)
  )
  tls: bool = setting(
    False, 'Machines talk through mutual TLS, with keys made for the run.'
  )
  open_port: bool = setting(
    False, "The run goes on where the queue's port cannot be kept to loopback."
  )

  def relations(self) -> Iterator[tuple[str, str]]:
    if self.tls and self.kind == 'local':
      yield 'tls', f'has no meaning with transport.kind {self.kind!r}'


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """What plays whole games with the newest checkpoint while the run goes on."""

  enabled: bool = setting(True, 'There is an evaluator.')
  interval: float = setting(
    60.0, 'So many seconds pass from the end of an evaluation to the next.', POSITIVE
  )
  episodes: int = setting(
    5,
    'An evaluation plays so many episodes of each level.',
    at_least(1),
    at_most(1_000_000),
  )
  processes: int = setting(
    5,
    'So many environments are played at a time. In dmlab and doom each is a process.',
    at_least(1),
    at_most(4096),
  )
  video: bool = setting(True, 'The last evaluation is filmed.')
  greedy: bool = setting(False, 'The likeliest action is taken instead of a sample.')


# Fields that `environment` had, and the suites that have them now.
_MOVED = {
  'action_repeat': ('atari', 'dmlab', 'doom'),
  'episodic_life': ('atari',),
  'sticky_actions': ('atari',),
  'max_episode_frames': ('atari', 'doom'),
  'full_action_space': ('atari',),
  'action_set': ('dmlab', 'doom'),
  'frame_width': ('dmlab', 'doom'),
  'frame_height': ('dmlab', 'doom'),
  'skip_unavailable_levels': ('dmlab',),
  'step_timeout': ('dmlab', 'doom'),
  'reset_timeout': ('dmlab', 'doom'),
  'engine_restarts': ('dmlab', 'doom'),
  'level_cache': ('dmlab',),
  'level_cache_gib': ('dmlab',),
  'episode_seeds': ('dmlab',),
  'dataset_path': ('dmlab',),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """The whole of a run.

  Attributes:
    suite_settings: those of the run's suite, of the class that the suite declares.
      None for its defaults: an object that equals them becomes None. In `override` and
      in JSON they are a section of the suite's name.
  """

  name: str = setting(
    'custom',
    'People know the run by this name. It begins the name of its directory.',
    _PART_OF_A_PATH,
  )
  seed: int = setting(
    1, 'All random numbers of the run follow from it.', NOT_NEGATIVE, below(2**31)
  )
  environment: Environment = Environment()
  network: Network = Network()
  loss: Loss = Loss()
  optimizer: Optimizer = Optimizer()
  actor: Actor = Actor()
  inference: Inference = Inference()
  learner: Learner = Learner()
  transport: Transport = Transport()
  evaluator: Evaluator = Evaluator()
  suite_settings: settings.Section | None = settings.unlisted(None)

  def __post_init__(self) -> None:
    given = self.suite_settings
    if given is not None and given == type(given)():
      object.__setattr__(self, 'suite_settings', None)

  def of_suite(self, kind: type[S]) -> S:
    """The settings of the run's suite, whose class is `kind`.

    Raises:
      ConfigError: those given are of another class.
    """
    found = kind() if self.suite_settings is None else self.suite_settings
    if not isinstance(found, kind):
      raise ConfigError(
        f'suite_settings is {found!r}: must be of {kind.__module__}.'
        f'{kind.__qualname__}, for environment.suite is {self.environment.suite!r}'
      )
    return found

  @property
  def suite_section(self) -> settings.Section | None:
    """Settings of the run's suite; None where it has none, or is not known here.

    Raises:
      ConfigError: the suite cannot be imported, or has other settings than those given.
    """
    kind = suites.settings_of(self.environment.suite)
    if kind is not None:
      return self.of_suite(kind)
    if self.suite_settings is not None:
      raise ConfigError(
        f'suite_settings is {self.suite_settings!r}: the suite '
        f'{self.environment.suite!r} has no settings, or is not known here'
      )
    return None

  @property
  def action_repeat(self) -> int:
    """Frames of an agent step: 1 where the suite has no such setting."""
    return int(getattr(self.suite_section, 'action_repeat', 1))

  @property
  def frames_per_update(self) -> int:
    return self.learner.batch_size * self.actor.unroll_length * self.action_repeat

  @property
  def total_updates(self) -> int:
    return max(1, -(-self.learner.total_frames // self.frames_per_update))

  @property
  def inference_environments(self) -> int:
    """How many environments one inference server has room for."""
    if self.inference.max_environments or not self.inference.servers:
      return self.inference.max_environments
    actors = -(-self.actor.num_actors // self.inference.servers)
    return 2 * actors * self.actor.envs_per_actor

  @property
  def queue_capacity(self) -> int:
    """Unrolls."""
    return self.transport.queue_batches * self.learner.batch_size

  def size_problems(self, step_bytes: int = _LEAST_STEP) -> Iterator[tuple[str, str]]:
    """Fields, and what is allowed, by which a process would need absurd memory.

    Args:
      step_bytes: of a time step that travels.
    """
    actor, learner, network = self.actor, self.learner, self.network
    unroll = (actor.unroll_length + 1) * step_bytes
    needs = {
      'network.hidden': (network.hidden * _FEATURES * _PARAMETER_BYTES, 'they'),
      'network.lstm': (
        4 * network.lstm * (network.hidden + network.lstm) * _PARAMETER_BYTES,
        f'with network.hidden {network.hidden} they',
      ),
      'actor.envs_per_actor': (
        max(actor.envs_per_actor, self.evaluator.processes) * unroll,
        f'with actor.unroll_length {actor.unroll_length} they',
      ),
      'learner.batch_size': (
        (self.queue_capacity + 2 * learner.batch_size) * unroll,
        f'with transport.queue_batches {self.transport.queue_batches} and '
        f'actor.unroll_length {actor.unroll_length} they',
      ),
    }
    for field, (size, what) in needs.items():
      if size >= _TOO_MUCH:
        yield (
          field,
          f'{what} would need {size / 2**30:,.0f} GiB, and must need less than '
          f'{_TOO_MUCH // 2**30:,} in one process',
        )

  def relations(self) -> Iterator[tuple[str, str]]:
    yield from self.size_problems()
    frames = max(1, self.frames_per_update)
    if self.learner.total_frames // frames >= 2**31 - 1:
      yield 'learner.total_frames', f'must be below 2^31 updates of {frames} frames'
    steps = self.actor.unroll_length
    weight = self.loss.trace_lambda * min(self.loss.c_clip, types.LARGEST_TRACE)
    most = types.largest_trace_weight(max(1, steps))
    if self.loss.correction == 'vtrace' and weight > most:
      yield (
        'loss.c_clip',
        f'times loss.trace_lambda must be at most {most:.4g} with actor.unroll_length '
        f'{steps}, or products of the weights overflow',
      )
    levels, envs = len(self.environment.levels), self.actor.envs_per_actor
    total_envs = envs * self.actor.num_actors
    if levels > total_envs:
      yield (
        'environment.levels',
        f'{levels} levels need as many environments, but there are '
        f'{self.actor.num_actors} actors x {envs} = {total_envs}',
      )
    # What even the newest unroll is behind when it trains: batches that wait in a full
    # queue and two that are read ahead; or what all environments make in its time.
    queue = self.transport.queue_batches + 2
    meanwhile = -(-total_envs // max(1, self.learner.batch_size))
    least = max(queue, meanwhile)
    if 0 < self.learner.max_policy_lag < least:
      yield (
        'learner.max_policy_lag',
        f'must be 0 (no limit) or at least {least}, or most unrolls would be refused: '
        f'one out of a full queue is transport.queue_batches + 2 = {queue} updates '
        f'behind, and {total_envs} environments / learner.batch_size = {meanwhile} '
        'updates pass while each makes one unroll',
      )
    if self.inference.servers > 0:
      yield from self._inference_relations()

  def _inference_relations(self) -> Iterator[tuple[str, str]]:
    inference, actor = self.inference, self.actor
    if self.transport.kind == 'local':
      yield (
        'inference.servers',
        'servers are processes of their own, which transport.kind '
        f'{self.transport.kind!r} has not',
      )
    if inference.servers > actor.num_actors:
      yield (
        'inference.servers',
        f'must not exceed actor.num_actors ({actor.num_actors}), or some would have '
        'nothing to do',
      )
    rows = actor.inference_batch or actor.envs_per_actor
    if inference.max_batch < rows:
      yield (
        'inference.max_batch',
        f'must hold what one actor asks at once, {rows} environments '
        '(actor.inference_batch, or actor.envs_per_actor)',
      )
    need = -(-actor.num_actors // inference.servers) * actor.envs_per_actor
    if 0 < inference.max_environments < need:
      yield (
        'inference.max_environments',
        f'must be 0 or at least the {need} of the actors dealt to one server',
      )
    if actor.platform != 'auto':
      yield (
        'actor.platform',
        'has no meaning with inference.servers, see inference.platform',
      )


def validate(
  config: Config, local_devices: int | None = None, learners: int = 1
) -> None:
  """Checks every setting, those of the suite too, and how they fit together.

  Args:
    config: what to check.
    local_devices: devices of a learner process where known.
    learners: learner processes, each with as many devices.

  Raises:
    ConfigError: lists all problems, each with field, value and what is allowed.
  """
  settings.raise_problems(settings.wrong_types(config))
  settings.raise_problems(
    settings.problems((config, ''), *_suite_part(config))
    + _device_problems(config.learner, local_devices, learners)
  )


def what_differs(was: Any, config: Config) -> list[str]:
  """What of a run's settings must be kept when it goes on, and would not be.

  Args:
    was: settings of the run, as `to_dict` makes them, perhaps of an earlier version;
      None where they are not known.
    config: with which it is to go on.

  Returns:
    A text for each setting, with its name, what it was and what it would be.
  """
  if not isinstance(was, dict):
    return []
  found = settings.changed(was, config)
  for section, prefix in _suite_part(config):
    # Another suite's are not comparable, and that has been said above.
    if not any(text.startswith('environment.suite ') for text in found):
      found += settings.changed(was.get(config.environment.suite), section, prefix)
  return found


def check_sizes(config: Config, step_bytes: int) -> None:
  """Raises ConfigError where a process would need absurd memory.

  Args:
    config: valid.
    step_bytes: of a time step that travels.
  """
  found = config.size_problems(step_bytes)
  settings.raise_problems([f'{field} is too much: {why}' for field, why in found])


def suite_problems(config: Config) -> list[str]:
  """What is wrong with the settings of the run's suite.

  Raises:
    ConfigError: see `Config.suite_section`.
  """
  return settings.problems(*_suite_part(config))


def override(config: Config, texts: Sequence[str]) -> Config:
  """Applies `section.field=value` settings; lists are separated by commas.

  The settings of the run's suite are a section of its name. Another suite drops those
  of the suite before.

  Raises:
    ConfigError: lists every unknown field and unreadable value.
  """
  found = []
  own = settings.kinds(Config)
  # Those of the suite last: it decides what they are.
  for text in sorted(texts, key=lambda t: _section_of(t) not in own):
    try:
      config = _assign(config, *settings.split(text))
    except ConfigError as e:
      found.append(str(e))
  if found:
    raise ConfigError('\n'.join(found))
  return config


def to_dict(config: Config) -> dict[str, Any]:
  """Plain JSON-able form, with the settings of the suite as a section of its name."""
  data = dataclasses.asdict(config)
  del data['suite_settings']
  section = config.suite_section
  if section is not None:
    data[config.environment.suite] = dataclasses.asdict(section)
  plain: dict[str, Any] = json.loads(json.dumps(data))
  return plain


def from_dict(data: Any) -> Config:
  """The inverse of `to_dict`; what lacks takes its default.

  Raises:
    ConfigError: lists every unknown field and section, and every value of a wrong type.
  """
  if not isinstance(data, dict):
    raise ConfigError(f'the configuration is {data!r}: must be a JSON object')
  found = []
  suite, environment = Environment().suite, data.get('environment')
  if isinstance(environment, dict):
    named = environment.get('suite')
    suite = named if isinstance(named, str) else suite
    found += [_moved(name, suite) for name in environment if name in _MOVED]
    rest = {k: v for k, v in environment.items() if k not in _MOVED}
    data = {**data, 'environment': rest}
  own = settings.kinds(Config)
  config = settings.from_dict(
    Config, {k: v for k, v in data.items() if k in own}, '', found
  )
  for name in data:
    if name in own:
      continue
    try:
      section = settings.from_dict(
        _settings_of(name, suite, f'{name}.*'), data[name], f'{name}.', found
      )
      config = dataclasses.replace(config, suite_settings=section)
    except ConfigError as e:
      found.append(str(e))
  if found:
    raise ConfigError('\n'.join(found))
  return config


def describe_settings() -> list[settings.SettingInfo]:
  """All settings that there are, those of every suite known in this process last."""
  found = list(settings.describe(Config))
  for name in suites.names():
    kind = suites.settings_of(name)
    if kind is not None:
      found += settings.describe(kind, f'{name}.')
  return found


def _assign(config: Config, name: str, text: str) -> Config:
  suite = config.environment.suite
  section, _, field = name.partition('.')
  if section == 'environment' and field in _MOVED:
    raise ConfigError(_moved(field, suite))
  if section in settings.kinds(Config):
    config = settings.assign(config, name, text)
    if config.environment.suite != suite:
      config = dataclasses.replace(config, suite_settings=None)
    return config
  # The name of a suite may have dots.
  prefix = f'{suite}.' if name.startswith(f'{suite}.') else f'{section}.'
  kind = _settings_of(prefix[:-1], suite, name)
  if name == prefix[:-1]:
    raise ConfigError(f'{name} is a section: write {name}.field=value')
  changed = settings.assign(
    config.of_suite(kind), name.removeprefix(prefix), text, prefix
  )
  return dataclasses.replace(config, suite_settings=changed)


def _settings_of(section: str, suite: str, name: str) -> type[settings.Section]:
  """The settings of the run's suite, where `section` is its name.

  Raises:
    ConfigError: it is not, so there is no setting `name`.
  """
  if section == suite:
    kind = suites.settings_of(suite)
    if kind is not None:
      return kind
    suites.find(suite)  # Raises where it is not known.
    raise ConfigError(f'unknown setting {name}: the suite {suite} has none')
  if section in suites.names():
    raise ConfigError(f'{name} has no effect: environment.suite is {suite!r}')
  raise ConfigError(settings.unknown(name, '', [*settings.kinds(Config), suite]))


def _suite_part(config: Config) -> list[tuple[settings.Section, str]]:
  section = config.suite_section
  return [] if section is None else [(section, f'{config.environment.suite}.')]


def _moved(field: str, suite: str) -> str:
  now = _MOVED[field]
  names = ' or '.join(f'{s}.{field}' for s in ((suite,) if suite in now else now))
  return f'environment.{field} is now {names}'


def _section_of(text: str) -> str:
  return text.partition('=')[0].partition('.')[0].strip()


def _device_problems(
  learner: Learner, local_devices: int | None, learners: int
) -> list[str]:
  found = []
  # Where a learner's devices are not known yet, it has at least one.
  devices = learners * (learner.num_devices or local_devices or 1)
  if devices > 0 and learner.batch_size % devices:
    each = f' ({learners} learners x {devices // learners})' if learners > 1 else ''
    found.append(
      f'learner.batch_size is {learner.batch_size}: must be a multiple of the number '
      f'of devices{each}: {learner.batch_size} = {learner.batch_size // devices} x '
      f'{devices} + {learner.batch_size % devices}'
    )
  if local_devices and learner.num_devices > local_devices:
    found.append(
      f'learner.num_devices is {learner.num_devices}: this machine has {local_devices}'
    )
  return found
