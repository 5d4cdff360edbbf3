"""One configuration object: a notebook, a local run and a cluster run share it.

Frozen dataclasses, and `override`, which takes `section.field=value` texts as flags
give them. `config_validation` says what is impossible. Named configurations live in
`experiments/`.
"""

import dataclasses
import difflib
import json
import types as pytypes
import typing
from collections.abc import Sequence
from typing import Any

TORSOS = ('shallow', 'deep', 'nature', 'mlp')
OPTIMIZERS = ('rmsprop', 'adam')
SCHEDULES = ('linear', 'constant')
TRANSPORTS = ('reverb', 'local')
DTYPES = ('float32', 'bfloat16')
PLATFORMS = ('auto', 'cpu', 'gpu', 'tpu')


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
  # Suites whose engines run in processes of their own (dmlab, doom):
  action_set: str = 'default'  # Named by the suite.
  frame_width: int = 96  # Pixels.
  frame_height: int = 72
  skip_unavailable_levels: bool = False  # Else a level that lacks its data is refused.
  step_timeout: float = 60.0  # Seconds; an engine that takes longer is replaced.
  reset_timeout: float = 300.0
  engine_restarts: int = 5  # Of one environment within ten minutes; more end the actor.
  level_cache: str = ''  # Directory of compiled maps; '' for the user's cache folder.
  level_cache_gib: float = 10.0  # Its bound; 0 for no cache.
  episode_seeds: int = 0  # DeepMind Lab: training episodes draw from so many seeds,
  # so that maps repeat and the level cache hits; 0 for all 2^31.
  dataset_path: str = ''  # DeepMind Lab: the pictures of two psychlab levels.


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
  # Where an actor's own policy runs. 'auto': on the CPU in a process of its own, with
  # the learner where actors are threads of its process.
  platform: str = 'auto'


@dataclasses.dataclass(frozen=True)
class Inference:
  """Servers that run the policy for the actors, in place of policies of their own."""

  servers: int = 0  # Processes; actor i asks server i modulo that. 0 for none.
  max_batch: int = 256  # Environments per policy call.
  deadline_ms: float = 2.0  # That the oldest request waits for more to come.
  max_environments: int = 0  # Of one server, 0 for twice those dealt to it.
  platform: str = 'auto'  # 'auto' takes what JAX takes on that host.


@dataclasses.dataclass(frozen=True)
class Learner:
  batch_size: int = 32  # Unrolls per update, over all devices.
  total_frames: int = 200_000_000
  publish_interval: int = 1  # Updates between published parameters.
  max_policy_lag: int = 0  # Updates; older unrolls are refused. 0: no limit.
  metrics_interval: float = 2.0  # Seconds between metric records.
  checkpoint_interval: float = 60.0  # Seconds between checkpoints.
  keep_checkpoints: int = 3
  num_devices: int = 0  # Local devices for pmap, 0 for all.


@dataclasses.dataclass(frozen=True)
class Transport:
  kind: str = 'reverb'
  queue_batches: int = 2  # Capacity of the queue, in batches.
  tls: bool = False  # Between machines: mutual TLS, with keys made for the run.
  open_port: bool = False  # Go on where the queue's port cannot be kept to loopback.


@dataclasses.dataclass(frozen=True)
class Evaluator:
  enabled: bool = True
  interval: float = 60.0  # Seconds between evaluations, their own time excluded.
  episodes: int = 5  # Per level and evaluation.
  processes: int = 5  # Environments at a time; in dmlab and doom so many processes.
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
  inference: Inference = Inference()
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
