"""One configuration object: a notebook, a local run and a cluster run share it.

Frozen dataclasses with `validate`, which reports every problem at once, and
`override`, which takes `section.field=value` texts as flags give them. Named
configurations live in `experiments/`.
"""

import dataclasses
import difflib
import json
import types as pytypes
import typing
from collections.abc import Sequence
from typing import Any

TORSOS = ('shallow', 'deep', 'nature', 'mlp')
CORRECTIONS = ('vtrace', 'one_step_is', 'epsilon_correction', 'no_correction')
REWARD_CLIPPING = ('abs_one', 'soft_asymmetric', 'none')
VTRACE_METHODS = ('auto', 'scan', 'associative')
OPTIMIZERS = ('rmsprop', 'adam')
SCHEDULES = ('linear', 'constant')
TRANSPORTS = ('reverb', 'local')
DTYPES = ('float32', 'bfloat16')


class ConfigError(ValueError):
  """One or more impossible settings; the text lists all of them."""


@dataclasses.dataclass(frozen=True)
class Environment:
  """Which games, and how they are played in training."""

  suite: str = 'atari'
  levels: tuple[str, ...] = ('breakout',)  # Tasks; several make one multi-task agent.
  action_repeat: int = 4  # Frames per agent step.
  episodic_life: bool = True  # Atari: a lost life ends an episode in training.
  sticky_actions: float = 0.0  # Atari: probability that an action is repeated.
  max_episode_frames: int = 108_000
  full_action_space: bool = False  # Atari: all 18 actions; always so for several games.


@dataclasses.dataclass(frozen=True)
class Network:
  torso: str = 'nature'
  hidden: int = 512  # Units of the linear layer after the torso.
  lstm: int = 0  # LSTM units, 0 for none.
  frame_stack: int = 4  # Frames the network sees at once; they travel once each.
  last_action_reward: bool = False  # Feed the last action and reward.
  instructions: bool = False  # Encode a text observation.
  dtype: str = 'float32'  # Of the torso; heads and loss are float32 always.


@dataclasses.dataclass(frozen=True)
class Loss:
  discount: float = 0.99
  baseline_cost: float = 0.5
  entropy_cost: float = 0.01
  correction: str = 'vtrace'
  rho_clip: float = 1.0
  c_clip: float = 1.0
  pg_rho_clip: float = 1.0
  trace_lambda: float = 1.0
  reward_clipping: str = 'abs_one'
  vtrace_method: str = 'auto'


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Losses are sums over time and batch; learning rates assume that."""

  name: str = 'rmsprop'
  learning_rate: float = 6e-4
  schedule: str = 'linear'  # To 0 at `learner.total_frames`.
  decay: float = 0.99  # RMSProp.
  momentum: float = 0.0  # RMSProp.
  epsilon: float = 0.01  # RMSProp: inside the root. Adam: outside.
  adam_b1: float = 0.9
  adam_b2: float = 0.999
  max_grad_norm: float = 40.0  # Global-norm clip, 0 for none.


@dataclasses.dataclass(frozen=True)
class Actor:
  num_actors: int = 1
  envs_per_actor: int = 32
  unroll_length: int = 20  # Agent steps.
  inference_batch: int = 0  # Environments per policy call, 0 for all of an actor's.
  env_threads: int = 1  # Native threads that step an actor's environments.
  send_logits: bool = False  # Behaviour logits travel too.


@dataclasses.dataclass(frozen=True)
class Learner:
  batch_size: int = 32  # Unrolls per update, over all devices.
  total_frames: int = 200_000_000
  publish_interval: int = 1  # Updates between published parameters.
  metrics_interval: float = 2.0  # Seconds between metric records.
  checkpoint_interval: float = 60.0  # Seconds between checkpoints.
  keep_checkpoints: int = 3
  num_devices: int = 0  # Local devices for pmap, 0 for all.


@dataclasses.dataclass(frozen=True)
class Transport:
  kind: str = 'reverb'
  queue_batches: int = 2  # Capacity of the queue, in batches.


@dataclasses.dataclass(frozen=True)
class Evaluator:
  enabled: bool = True
  interval: float = 60.0  # Seconds between evaluations, their own time excluded.
  episodes: int = 5  # Per level and evaluation.
  video: bool = True  # Of the last evaluation.
  greedy: bool = False  # Take the likeliest action instead of sampling.


@dataclasses.dataclass(frozen=True)
class Config:
  """The whole of a run."""

  name: str = 'custom'
  seed: int = 1
  environment: Environment = Environment()
  network: Network = Network()
  loss: Loss = Loss()
  optimizer: Optimizer = Optimizer()
  actor: Actor = Actor()
  learner: Learner = Learner()
  transport: Transport = Transport()
  evaluator: Evaluator = Evaluator()

  @property
  def frames_per_update(self) -> int:
    return (
      self.learner.batch_size
      * self.actor.unroll_length
      * self.environment.action_repeat
    )

  @property
  def total_updates(self) -> int:
    return max(1, -(-self.learner.total_frames // self.frames_per_update))

  @property
  def queue_capacity(self) -> int:
    """Unrolls."""
    return self.transport.queue_batches * self.learner.batch_size


def validate(config: Config, local_devices: int | None = None) -> None:
  """Checks every field and how they fit together.

  Args:
    config: what to check.
    local_devices: devices of the learner process where known.

  Raises:
    ConfigError: lists all problems, each with field, value and what is allowed.
  """
  problems: list[str] = []

  def need(ok: bool, field: str, allowed: str) -> None:
    if not ok:
      value: Any = config
      for part in field.split('.'):
        value = getattr(value, part)
      problems.append(f'{field} is {value!r}: {allowed}')

  def one_of(field: str, allowed: Sequence[str]) -> None:
    value: Any = config
    for part in field.split('.'):
      value = getattr(value, part)
    need(value in allowed, field, 'must be one of ' + ', '.join(allowed))

  one_of('network.torso', TORSOS)
  one_of('network.dtype', DTYPES)
  one_of('loss.correction', CORRECTIONS)
  one_of('loss.reward_clipping', REWARD_CLIPPING)
  one_of('loss.vtrace_method', VTRACE_METHODS)
  one_of('optimizer.name', OPTIMIZERS)
  one_of('optimizer.schedule', SCHEDULES)
  one_of('transport.kind', TRANSPORTS)

  need(len(config.environment.levels) > 0, 'environment.levels', 'at least one level')
  for field in (
      'environment.action_repeat', 'environment.max_episode_frames',
      'network.hidden', 'network.frame_stack', 'actor.num_actors',
      'actor.envs_per_actor', 'actor.unroll_length', 'actor.env_threads',
      'learner.batch_size', 'learner.total_frames', 'learner.publish_interval',
      'learner.keep_checkpoints', 'transport.queue_batches', 'evaluator.episodes',
  ):  # fmt: skip
    section, name = field.split('.')
    need(getattr(getattr(config, section), name) >= 1, field, 'must be at least 1')
  for field in (
      'network.lstm', 'loss.baseline_cost', 'loss.entropy_cost', 'loss.rho_clip',
      'loss.c_clip', 'loss.pg_rho_clip', 'loss.trace_lambda', 'optimizer.momentum',
      'optimizer.max_grad_norm', 'actor.inference_batch', 'learner.num_devices',
  ):  # fmt: skip
    section, name = field.split('.')
    need(getattr(getattr(config, section), name) >= 0, field, 'must not be negative')
  for field in (
      'optimizer.learning_rate', 'optimizer.epsilon', 'learner.metrics_interval',
      'learner.checkpoint_interval', 'evaluator.interval',
  ):  # fmt: skip
    section, name = field.split('.')
    need(getattr(getattr(config, section), name) > 0, field, 'must be positive')
  for field in (
      'environment.sticky_actions', 'loss.discount', 'optimizer.decay',
      'optimizer.adam_b1', 'optimizer.adam_b2',
  ):  # fmt: skip
    section, name = field.split('.')
    value = getattr(getattr(config, section), name)
    need(0 <= value <= 1, field, 'must lie in [0, 1]')
  need(config.environment.sticky_actions < 1, 'environment.sticky_actions',
       'must be below 1, or no action would ever be taken')  # fmt: skip
  need(0 <= config.seed < 2**31, 'seed', 'must lie in [0, 2^31)')

  need(
    config.loss.c_clip <= config.loss.rho_clip,
    'loss.c_clip',
    f'must not exceed loss.rho_clip ({config.loss.rho_clip})',
  )
  envs = config.actor.envs_per_actor
  need(
    config.actor.inference_batch <= envs,
    'actor.inference_batch',
    f'must not exceed actor.envs_per_actor ({envs})',
  )
  levels = len(config.environment.levels)
  total_envs = envs * config.actor.num_actors
  need(
    levels <= total_envs,
    'environment.levels',
    f'{levels} levels need as many environments, but there are '
    f'{config.actor.num_actors} actors x {envs} = {total_envs}',
  )
  devices = config.learner.num_devices or local_devices
  if devices:
    need(
      config.learner.batch_size % devices == 0,
      'learner.batch_size',
      f'must be a multiple of the number of devices: {config.learner.batch_size} = '
      f'{config.learner.batch_size // devices} x {devices} + '
      f'{config.learner.batch_size % devices}',
    )
  if local_devices:
    need(
      config.learner.num_devices <= local_devices,
      'learner.num_devices',
      f'this machine has {local_devices}',
    )
  if problems:
    raise ConfigError(
      f'{len(problems)} impossible setting(s):\n  ' + '\n  '.join(problems)
    )


def override(config: Config, settings: Sequence[str]) -> Config:
  """Applies `section.field=value` settings; lists are separated by commas.

  Raises:
    ConfigError: lists every unknown field and unreadable value.
  """
  problems = []
  for setting in settings:
    key, eq, text = setting.partition('=')
    try:
      if not eq:
        raise ConfigError(f'{setting!r}: write section.field=value')
      config = _replace(config, key.strip().split('.'), text.strip(), key.strip())
    except ConfigError as e:
      problems.append(str(e))
  if problems:
    raise ConfigError('\n'.join(problems))
  return config


def to_dict(config: Config) -> dict[str, Any]:
  """Plain JSON-able form."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(data: dict[str, Any]) -> Config:
  """The inverse of `to_dict`; refuses unknown fields."""
  return _from_dict(Config, data, '')


def _from_dict(cls: type, data: dict[str, Any], prefix: str) -> Any:
  hints = typing.get_type_hints(cls)
  values = {}
  for key, value in data.items():
    if key not in hints:
      raise ConfigError(_unknown(prefix + key, cls, prefix))
    if dataclasses.is_dataclass(hints[key]):
      value = _from_dict(typing.cast(type, hints[key]), value, f'{prefix}{key}.')
    elif isinstance(value, list):
      value = tuple(value)
    values[key] = value
  return cls(**values)


def _replace(node: Any, path: list[str], text: str, full: str) -> Any:
  hints = typing.get_type_hints(type(node))
  prefix = full[: len(full) - len('.'.join(path))]
  name = path[0]
  if name not in hints:
    raise ConfigError(_unknown(full, type(node), prefix))
  current = getattr(node, name)
  if dataclasses.is_dataclass(current):
    if len(path) == 1:
      raise ConfigError(f'{full} is a section: write {full}.field=value')
    value = _replace(current, path[1:], text, full)
  elif len(path) > 1:
    raise ConfigError(f'{full}: {prefix}{name} has no fields')
  else:
    value = _parse(text, hints[name], full)
  return dataclasses.replace(node, **{name: value})


def _parse(text: str, kind: Any, full: str) -> Any:
  try:
    if kind is bool:
      return {'true': True, '1': True, 'false': False, '0': False}[text.lower()]
    if kind is int:
      number = float(text.replace('_', ''))  # 2e6 is a number of frames, too.
      if number != int(number):
        raise ValueError
      return int(number)
    if kind is float:
      return float(text)
    if isinstance(kind, pytypes.GenericAlias):
      return tuple(part.strip() for part in text.split(',') if part.strip())
    return text
  except (KeyError, ValueError, OverflowError):
    name = getattr(kind, '__name__', str(kind))
    raise ConfigError(f'{full}={text!r}: not a valid {name}') from None


def _unknown(full: str, cls: type, prefix: str) -> str:
  names = [f.name for f in dataclasses.fields(cls)]
  near = difflib.get_close_matches(full[len(prefix) :].split('.')[0], names, 3)
  hint = (
    f'did you mean {", ".join(prefix + n for n in near)}?'
    if near
    else ('known are ' + ', '.join(prefix + n for n in names))
  )
  return f'unknown setting {full}: {hint}'
