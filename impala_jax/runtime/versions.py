"""Versions that figures and runs are recorded with."""

import importlib.metadata
import platform

_PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'numpy',
  'ale-py',
  'dm-reverb',
  'tensorflow-cpu',
  'xxhash',
  'torch',
)


def installed() -> dict[str, str]:
  """Python, processor and the packages that matter, where installed."""
  found = {'python': platform.python_version(), 'machine': platform.machine()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found
