"""Which suites of levels there are, by name. None is loaded before it is asked for.

Beneath the configuration, which holds the settings of a run's suite, and beneath the
suites, which are made from a configuration.
"""

import difflib
import importlib
from typing import Any

from impala_jax import settings

_suites: dict[str, Any] = {
  'atari': 'impala_jax.environments.atari.suite:SUITE',
  'catch': 'impala_jax.environments.catch:SUITE',
  'dmlab': 'impala_jax.environments.dmlab.suite:SUITE',
  'doom': 'impala_jax.environments.doom.suite:SUITE',
  'procgen': 'impala_jax.environments.procgen:SUITE',
}


def register(name: str, suite: Any) -> None:
  """Makes a suite known in this process; one of the same name is replaced."""
  _suites[name] = suite


def names() -> tuple[str, ...]:
  """Of the suites known in this process."""
  return tuple(sorted(_suites))


def find(name: str) -> Any:
  """The suite of that name, or what `package.module:attribute` names.

  Raises:
    ConfigError: there is none.
  """
  known = _suites.get(name, name)
  if not isinstance(known, str):
    return known
  module, colon, attribute = known.partition(':')
  if colon:
    try:
      return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
      raise settings.ConfigError(f'environment.suite is {name!r}: {e}') from e
  near = difflib.get_close_matches(name, _suites, 1)
  hint = f'did you mean {near[0]}?' if near else f'known are {", ".join(names())};'
  raise settings.ConfigError(
    f'environment.suite is {name!r}: {hint} your own is made known by '
    'registry.register, or named as package.module:attribute'
  )


def settings_of(name: str) -> type[settings.Section] | None:
  """The class of a suite's settings; None where it has none, or is not known here.

  An environment that is handed over, not named, has a suite that nobody knows.

  Raises:
    ConfigError: `name` is package.module:attribute, and there is no such.
    TypeError: the class is none of settings, see `settings.check_class`.
  """
  if name not in _suites and ':' not in name:
    return None
  found: type[settings.Section] | None = getattr(find(name), 'settings', None)
  if found is not None:
    settings.check_class(found)
  return found
