"""Four fake devices, so that pmap is tested, set before JAX is imported; fixtures."""

import os

import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=4'
).strip()


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
