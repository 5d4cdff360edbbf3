"""Where compilations are kept, and that a role's process uses the place."""

import dataclasses
import os
import stat
import subprocess
import sys

import pytest

from impala_jax import config as config_lib
from impala_jax import configs
from impala_jax.launching import run_directory
from impala_jax.runtime import compile_cache

_VARIABLE = 'JAX_COMPILATION_CACHE_DIR'


@pytest.fixture
def variables(monkeypatch, tmp_path):
  """Without a place, and with a home of its own; JAX's settings are left alone."""
  monkeypatch.delitem(sys.modules, 'jax', raising=False)
  monkeypatch.delenv(_VARIABLE, raising=False)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return monkeypatch


def test_the_place_is_the_users_alone(variables, tmp_path):
  folder = compile_cache.enable()
  assert folder.parent == tmp_path / 'cache' / 'impala_jax'
  assert stat.S_IMODE(folder.stat().st_mode) == 0o700
  assert os.environ[_VARIABLE] == str(folder)
  assert compile_cache.enable() == folder


@pytest.mark.parametrize('place', ['/elsewhere', ''])
def test_a_place_that_was_named_is_left_alone(variables, tmp_path, place):
  variables.setenv(_VARIABLE, place)
  assert str(compile_cache.enable() or '') == place
  assert os.environ[_VARIABLE] == place
  assert not (tmp_path / 'cache').exists()


def test_it_does_without_where_nothing_can_be_written(variables, tmp_path):
  (tmp_path / 'cache').write_text('a file')
  assert compile_cache.enable() is None
  assert _VARIABLE not in os.environ


def test_other_processors_have_another_place(variables, tmp_path):
  first = compile_cache.enable()
  variables.delenv(_VARIABLE)
  variables.setattr(compile_cache.platform, 'machine', lambda: 'riscv64')
  assert compile_cache.enable() != first


def test_a_role_that_starts_again_compiles_nothing_anew(tmp_path):
  place = tmp_path / 'xla'
  # All are kept, whatever time they take here.
  environment = {
    **os.environ,
    _VARIABLE: str(place),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }

  def train(number):
    config = config_lib.override(
      configs.get('catch'),
      ['transport.kind=local', 'learner.total_frames=2000', 'evaluator.enabled=false'],
    )
    run_dir = tmp_path / f'run-{number}'
    run_directory.create(dataclasses.replace(config, seed=number), str(run_dir))
    done = subprocess.run(
      [sys.executable, '-m', 'impala_jax.distributed.roles.run', 'all'],
      env={**environment, 'IMPALA_RUN_DIR': str(run_dir)},
      capture_output=True,
      text=True,
      timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {p.name for p in place.iterdir() if p.name.endswith('-cache')}

  first = train(0)
  # The policy's call; the names of the others are JAX's versions' choice.
  assert any('jit_act' in name for name in first), first
  assert train(1) == first
