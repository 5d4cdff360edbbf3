"""IMPALA on JAX: actors, V-trace learner, and what connects them.

The names below load on first use, so that `import impala_jax` is quick and a
launcher need not load JAX.
"""

import importlib
from typing import Any

__version__ = '0.1.0'

_EXPORTS = {
  'Config': 'impala_jax.config',
  'ConfigError': 'impala_jax.config',
  'override': 'impala_jax.config',
  'train': 'impala_jax.training',
  'evaluate': 'impala_jax.training',
  'TrainResult': 'impala_jax.training',
  'make_loss': 'impala_jax.losses',
  'make_agent': 'impala_jax.agents.agent',
  'ImpalaNetwork': 'impala_jax.agents.networks',
  'GymnasiumEnvironment': 'impala_jax.environments.adapters',
  'AgentOutput': 'impala_jax.types',
  'TimeStep': 'impala_jax.types',
  'Unroll': 'impala_jax.types',
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
  if name not in _EXPORTS:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
  return [*globals(), *__all__]
