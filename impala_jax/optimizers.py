"""The optimisers of the paper's runs, from a configuration."""

import optax

from impala_jax import config as config_lib
from impala_jax import settings as settings_lib


def make_optimizer(config: config_lib.Config) -> optax.GradientTransformation:
  """Global-norm clip, then RMSProp or Adam, with the configured schedule.

  RMSProp is TensorFlow's, with which the published learning rates were found: epsilon
  inside the square root, mean square starting at 1, the learning rate inside the
  momentum. For gradients g with running mean square s (from 1) and momentum m (from 0):

      s <- decay s + (1 - decay) g^2
      m <- momentum m + learning_rate g / sqrt(s + epsilon)
      parameter <- parameter - m

  The learning rate counts the updates applied, from 0: `learning_rate_at`.

  Raises:
    config.ConfigError: lists all impossible settings of the optimiser.
  """
  settings_lib.check(config.optimizer, 'optimizer.')
  settings = config.optimizer
  schedule = _schedule(config)
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


def learning_rate_at(config: config_lib.Config, updates: int) -> float:
  """The learning rate of the update that follows `updates` updates.

  Plain Python, so that it never waits for a device that is busy with updates.

  Raises:
    config.ConfigError: lists all impossible settings of the optimiser.
  """
  settings_lib.check(config.optimizer, 'optimizer.')
  settings = config.optimizer
  if settings.schedule == 'constant':
    return settings.learning_rate
  return settings.learning_rate * max(0.0, 1.0 - updates / config.total_updates)


def _schedule(config: config_lib.Config) -> optax.Schedule:
  settings = config.optimizer
  if settings.schedule == 'constant':
    return optax.constant_schedule(settings.learning_rate)
  return optax.linear_schedule(settings.learning_rate, 0.0, config.total_updates)
