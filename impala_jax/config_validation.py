"""Which settings are impossible, alone and together: all said at once."""

from collections.abc import Sequence
from typing import Any

from impala_jax import config as config_lib
from impala_jax import types


def validate(
  config: config_lib.Config, local_devices: int | None = None, learners: int = 1
) -> None:
  """Checks every field and how they fit together.

  Args:
    config: what to check.
    local_devices: devices of a learner process where known.
    learners: learner processes, each with as many devices.

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

  one_of('network.torso', config_lib.TORSOS)
  one_of('network.dtype', config_lib.DTYPES)
  one_of('loss.correction', types.CORRECTIONS)
  one_of('loss.reward_clipping', types.REWARD_CLIPPING)
  one_of('loss.vtrace_method', types.VTRACE_METHODS)
  one_of('optimizer.name', config_lib.OPTIMIZERS)
  one_of('optimizer.schedule', config_lib.SCHEDULES)
  one_of('transport.kind', config_lib.TRANSPORTS)
  one_of('actor.platform', config_lib.PLATFORMS)
  one_of('inference.platform', config_lib.PLATFORMS)

  need(len(config.environment.levels) > 0, 'environment.levels', 'at least one level')
  for field in (
      'environment.action_repeat', 'environment.max_episode_frames',
      'environment.frame_width', 'environment.frame_height',
      'network.hidden', 'network.frame_stack', 'actor.num_actors',
      'actor.envs_per_actor', 'actor.unroll_length', 'actor.env_threads',
      'learner.batch_size', 'learner.total_frames', 'learner.publish_interval',
      'learner.keep_checkpoints', 'transport.queue_batches', 'evaluator.episodes',
      'evaluator.processes', 'inference.max_batch',
  ):  # fmt: skip
    section, name = field.split('.')
    need(getattr(getattr(config, section), name) >= 1, field, 'must be at least 1')
  for field in (
      'network.lstm', 'loss.baseline_cost', 'loss.entropy_cost', 'loss.rho_clip',
      'loss.c_clip', 'loss.pg_rho_clip', 'loss.trace_lambda', 'optimizer.momentum',
      'optimizer.max_grad_norm', 'actor.inference_batch', 'learner.num_devices',
      'environment.engine_restarts', 'environment.level_cache_gib',
      'environment.episode_seeds', 'learner.max_policy_lag', 'inference.servers',
      'inference.deadline_ms', 'inference.max_environments',
  ):  # fmt: skip
    section, name = field.split('.')
    need(getattr(getattr(config, section), name) >= 0, field, 'must not be negative')
  for field in (
      'optimizer.learning_rate', 'optimizer.epsilon', 'learner.metrics_interval',
      'learner.checkpoint_interval', 'evaluator.interval',
      'environment.step_timeout', 'environment.reset_timeout',
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
  need(config.environment.episode_seeds <= 2**31, 'environment.episode_seeds',
       'must be at most 2^31')  # fmt: skip

  frames = max(1, config.frames_per_update)
  need(
    config.learner.total_frames // frames < 2**31 - 1,
    'learner.total_frames',
    f'must be below 2^31 updates of {frames} frames',
  )
  need(
    config.loss.c_clip <= config.loss.rho_clip,
    'loss.c_clip',
    f'must not exceed loss.rho_clip ({config.loss.rho_clip})',
  )
  need(
    not config.transport.tls or config.transport.kind == 'reverb',
    'transport.tls',
    f'has no meaning with transport.kind {config.transport.kind!r}',
  )
  envs = config.actor.envs_per_actor
  need(
    config.actor.inference_batch <= envs,
    'actor.inference_batch',
    f'must not exceed actor.envs_per_actor ({envs})',
  )
  if config.inference.servers > 0:
    problems += _inference(config)
  levels = len(config.environment.levels)
  total_envs = envs * config.actor.num_actors
  need(
    levels <= total_envs,
    'environment.levels',
    f'{levels} levels need as many environments, but there are '
    f'{config.actor.num_actors} actors x {envs} = {total_envs}',
  )
  # What even the newest unroll is behind when it trains: batches that wait in a full
  # queue and two that are read ahead; or what all environments make in its time.
  queue = config.transport.queue_batches + 2
  meanwhile = -(-total_envs // max(1, config.learner.batch_size))
  least = max(queue, meanwhile)
  need(
    config.learner.max_policy_lag <= 0 or config.learner.max_policy_lag >= least,
    'learner.max_policy_lag',
    f'must be 0 (no limit) or at least {least}, or most unrolls would be refused: '
    f'one out of a full queue is transport.queue_batches + 2 = {queue} updates behind, '
    f'and {total_envs} environments / learner.batch_size = {meanwhile} updates pass '
    'while each makes one unroll',
  )
  # Where a learner's devices are not known yet, it has at least one.
  devices = learners * (config.learner.num_devices or local_devices or 1)
  if devices > 0:
    each = f' ({learners} learners x {devices // learners})' if learners > 1 else ''
    need(
      config.learner.batch_size % devices == 0,
      'learner.batch_size',
      f'must be a multiple of the number of devices{each}: '
      f'{config.learner.batch_size} = {config.learner.batch_size // devices} x '
      f'{devices} + {config.learner.batch_size % devices}',
    )
  if local_devices:
    need(
      config.learner.num_devices <= local_devices,
      'learner.num_devices',
      f'this machine has {local_devices}',
    )
  if problems:
    raise config_lib.ConfigError(
      f'{len(problems)} impossible setting(s):\n  ' + '\n  '.join(problems)
    )


def _inference(config: config_lib.Config) -> list[str]:
  """What is wrong with inference servers, where there are any."""
  problems = []
  inference, actor = config.inference, config.actor
  if config.transport.kind != 'reverb':
    problems.append(
      f'inference.servers is {inference.servers}: servers are processes of their own, '
      f'which transport.kind {config.transport.kind!r} has not'
    )
  if inference.servers > actor.num_actors:
    problems.append(
      f'inference.servers is {inference.servers}: must not exceed actor.num_actors '
      f'({actor.num_actors}), or some would have nothing to do'
    )
  rows = actor.inference_batch or actor.envs_per_actor
  if inference.max_batch < rows:
    problems.append(
      f'inference.max_batch is {inference.max_batch}: must hold what one actor asks at '
      f'once, {rows} environments (actor.inference_batch, or actor.envs_per_actor)'
    )
  room = inference.max_environments
  need = -(-actor.num_actors // inference.servers) * actor.envs_per_actor
  if 0 < room < need:
    problems.append(
      f'inference.max_environments is {room}: must be 0 or at least the {need} of the '
      'actors dealt to one server'
    )
  if inference.deadline_ms > 10_000:
    problems.append(
      f'inference.deadline_ms is {inference.deadline_ms}: must be at most 10,000, or '
      'actors would take the server to be gone'
    )
  if actor.platform != 'auto':
    problems.append(
      f'actor.platform is {actor.platform!r}: has no meaning with inference.servers, '
      'see inference.platform'
    )
  return problems
