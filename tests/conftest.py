"""Four fake devices, so that pmap is tested, set before JAX is imported; fixtures."""

import os

import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.pop('JAX_COMPILATION_CACHE_DIR', None)
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=4'
).strip()


@pytest.fixture(scope='session', autouse=True)
def compilations(tmp_path_factory):
  """Processes that tests start share what they compile; the tests' own does not."""
  import jax  # Reads the variable now.

  assert not jax.config.jax_compilation_cache_dir
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(tmp_path_factory.mktemp('xla'))


@pytest.fixture
def figures(monkeypatch):
  """What was drawn and would be closed by now: a function that lists it."""
  pyplot = pytest.importorskip('matplotlib.pyplot')
  monkeypatch.setattr(pyplot, 'close', lambda figure: None)
  before = set(pyplot.get_fignums())
  yield lambda: [pyplot.figure(n) for n in pyplot.get_fignums() if n not in before]
  monkeypatch.undo()
  for number in set(pyplot.get_fignums()) - before:
    pyplot.close(number)
