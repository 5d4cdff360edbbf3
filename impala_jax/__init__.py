"""IMPALA on JAX: actors, V-trace learner, and what connects them.

The names below load on first use, so that `import impala_jax` is quick and a
launcher need not load JAX.
"""

TYPE_CHECKING = False  # As `typing` has it, without the import.

__version__ = '0.2.0'

# Where each name of the public face lives; a module where it is a module's own name.
_EXPORTS = {
  'AgentOutput': 'impala_jax.types',
  'Config': 'impala_jax.config',
  'ConfigError': 'impala_jax.config',
  'GymnasiumEnvironment': 'impala_jax.environments.adapters',
  'ImpalaNetwork': 'impala_jax.agents.networks',
  'TimeStep': 'impala_jax.types',
  'TrainResult': 'impala_jax.training',
  'Unroll': 'impala_jax.types',
  'config': 'impala_jax.config',
  'configs': 'impala_jax.configs',
  'environments': 'impala_jax.environments',
  'evaluate': 'impala_jax.training',
  'make_agent': 'impala_jax.agents.agent',
  'make_loss': 'impala_jax.losses',
  'override': 'impala_jax.config',
  'train': 'impala_jax.training',
  'types': 'impala_jax.types',
  'vtrace': 'impala_jax.vtrace',
}
__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
  # The same for type checkers, and for editors.
  from impala_jax import config as config
  from impala_jax import configs as configs
  from impala_jax import environments as environments
  from impala_jax import types as types
  from impala_jax import vtrace as vtrace
  from impala_jax.agents.agent import make_agent as make_agent
  from impala_jax.agents.networks import ImpalaNetwork as ImpalaNetwork
  from impala_jax.config import Config as Config
  from impala_jax.config import ConfigError as ConfigError
  from impala_jax.config import override as override
  from impala_jax.environments.adapters import (
    GymnasiumEnvironment as GymnasiumEnvironment,
  )
  from impala_jax.losses import make_loss as make_loss
  from impala_jax.training import TrainResult as TrainResult
  from impala_jax.training import evaluate as evaluate
  from impala_jax.training import train as train
  from impala_jax.types import AgentOutput as AgentOutput
  from impala_jax.types import TimeStep as TimeStep
  from impala_jax.types import Unroll as Unroll
else:
  # Hidden from type checkers: to them a name that is not above is an error.
  def __getattr__(name):
    if name not in _EXPORTS:
      raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    import importlib

    module = importlib.import_module(_EXPORTS[name])
    value = module if _EXPORTS[name] == f'{__name__}.{name}' else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
