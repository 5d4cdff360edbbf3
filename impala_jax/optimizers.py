"""The optimisers of the paper's runs, from a configuration."""

import jax.numpy as jnp
import optax

from impala_jax import config as config_lib
from impala_jax import settings as settings_lib


def make_optimizer(
  config: config_lib.Config, frames_ahead: int = 0
) -> optax.GradientTransformation:
  """Global-norm clip, then RMSProp or Adam, with the configured schedule.

  RMSProp is TensorFlow's, with which the published learning rates were found: epsilon
  inside the square root, mean square starting at 1, the learning rate inside the
  momentum. For gradients g with running mean square s (from 1) and momentum m (from 0):

      s <- decay s + (1 - decay) g^2
      m <- momentum m + learning_rate g / sqrt(s + epsilon)
      parameter <- parameter - m

  The learning rate follows the frames of the updates applied: `learning_rate_at`.

  Args:
    config: of the run.
    frames_ahead: that a run has beyond its updates times today's frames of one, see
      `runtime.checkpoint_files`.

  Raises:
    config.ConfigError: lists all impossible settings of the optimiser.
  """
  settings_lib.check(config.optimizer, 'optimizer.')
  settings = config.optimizer
  schedule = _schedule(config, frames_ahead)
  if settings.name == 'rmsprop':
    transformation = optax.rmsprop(
      schedule,
      decay=settings.decay,
      eps=settings.epsilon,
      initial_scale=1.0,
      eps_in_sqrt=True,
      momentum=settings.momentum or None,
    )
  else:
    transformation = optax.adam(
      schedule, b1=settings.adam_b1, b2=settings.adam_b2, eps=settings.epsilon
    )
  if settings.max_grad_norm == 0:
    return transformation
  return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), transformation)


def learning_rate_at(
  config: config_lib.Config, updates: int, frames_ahead: int = 0
) -> float:
  """The learning rate of the update that follows `updates` updates.

  Linear in frames, from `optimizer.learning_rate` at the first to 0 at
  `learner.total_frames`.

  Plain Python, so that it never waits for a device that is busy with updates.

  Raises:
    config.ConfigError: lists all impossible settings of the optimiser.
  """
  settings_lib.check(config.optimizer, 'optimizer.')
  settings = config.optimizer
  if settings.schedule == 'constant':
    return settings.learning_rate
  frames = updates * config.frames_per_update + frames_ahead
  return settings.learning_rate * max(0.0, 1.0 - frames / config.learner.total_frames)


def _schedule(config: config_lib.Config, frames_ahead: int) -> optax.Schedule:
  settings = config.optimizer
  if settings.schedule == 'constant':
    return optax.constant_schedule(settings.learning_rate)
  # In updates: frames may exceed what an int32 counts.
  per_update = config.frames_per_update
  ahead, end = frames_ahead / per_update, config.learner.total_frames / per_update
  return lambda count: (
    settings.learning_rate * jnp.clip(1.0 - (count + ahead) / end, 0.0, 1.0)
  )
