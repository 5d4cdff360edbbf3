"""Fixtures of several tests of environments."""

import pytest

from tests.environments.engines import failing_engines


@pytest.fixture
def make():
  """Makes pools that are closed after the test."""
  made = []

  def make_pool(*args, **kwargs):
    made.append(failing_engines.pool(*args, **kwargs))
    return made[-1]

  yield make_pool
  for pool in made:
    pool.close()
