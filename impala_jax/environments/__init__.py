"""Families of levels, and `registry`, which makes one's own known."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from impala_jax.environments import registry as registry
else:
  # On first use: the registry imports the rooms of this package.
  def __getattr__(name):
    if name != 'registry':
      raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    import importlib

    return importlib.import_module(f'{__name__}.registry')
