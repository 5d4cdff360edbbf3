"""What all tests need: XLA's settings, fixtures, and which test runs where."""

import os

import hypothesis
import pytest

# No test is about time: a busy machine is slow, and that is no failure.
hypothesis.settings.register_profile(
  'patient',
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile('patient')

pytest_plugins = ['tests.sets', 'tests.unsteady']

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.pop('JAX_COMPILATION_CACHE_DIR', None)
# Before JAX is imported. Four devices, so that pmap is tested; and machine code that is
# made in half of the time, as these programs are compiled to run a few times. What XLA
# makes of a program stays. Processes that tests start have neither.
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + ' --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0'
).strip()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  """For workers of xdist: what stays together, and what is slow first.

  A file's tests share what they compiled, so one worker runs them. Those of
  integration/ start processes for minutes and share nothing: any worker has the next.
  """
  if not hasattr(config, 'workerinput'):
    return
  items.sort(key=lambda item: 'integration' not in item.path.parts)
  for item in items:
    apart = 'integration' in item.path.parts or item.get_closest_marker('xdist_group')
    if not apart:
      item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish(session):
  """Refuses a pytest-xdist whose groups do nothing: some tests must run apart."""
  if not getattr(session.config.option, 'loadgroup', False):
    return
  for item in session.items:
    if item.get_closest_marker('xdist_group') and '@' not in item.nodeid:
      raise pytest.UsageError('this pytest-xdist has no effect on this pytest')


@pytest.fixture(scope='session', autouse=True)
def compilations(tmp_path_factory):
  """Processes that tests start share what they compile; the tests' own does not."""
  import jax  # Reads the variable now.

  assert not jax.config.jax_compilation_cache_dir
  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent  # Of all workers.
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder / 'xla')


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
