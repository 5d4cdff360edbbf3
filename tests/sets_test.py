"""Which test files the second set leaves out."""

import pathlib

import pytest

from tests import sets

_TESTS = pathlib.Path(__file__).parent


@pytest.mark.parametrize(
  ('file', 'reaches'),
  [
    ('vtrace_test.py', True),  # Imports it.
    ('acting/actor_test.py', True),
    ('runtime/compile_cache_test.py', True),  # Starts a command.
    ('integration/launch_test.py', True),
    ('config_test.py', False),
    ('environments/catch_test.py', False),
    ('environments/engines/process_pool_test.py', False),
  ],
)
def test_what_reaches_jax(file, reaches):
  assert sets.reaches_jax(_TESTS / file) == reaches


@pytest.mark.parametrize(
  ('text', 'reaches'),
  [
    ('import os', False),
    ('import jax.numpy as jnp', True),
    ('def test():\n  from impala_jax import losses', True),
    ('import impala_jax', True),  # Whose names load what they name.
    ('from impala_jax import config', False),
    ('from impala_jax.environments import catch', False),
    ('SCRIPT = "import jax"', True),
    ('run("-m", "impala_jax.distributed.roles.run")', True),
    ('from tests import synthetic', True),
    ('"""As impala_jax.losses does."""', False),
  ],
)
def test_the_rule(monkeypatch, tmp_path, text, reaches):
  place = _TESTS / 'a_file_of_no_test.py'
  read, exists = pathlib.Path.read_text, pathlib.Path.is_file
  monkeypatch.setattr(
    pathlib.Path,
    'read_text',
    lambda self, *a, **k: text if self == place else read(self, *a, **k),
  )
  monkeypatch.setattr(
    pathlib.Path, 'is_file', lambda self: self == place or exists(self)
  )
  sets._references.cache_clear()
  assert sets.reaches_jax(place) == reaches
  sets._references.cache_clear()
