"""What `impala doctor` finds here, and what it says of what is not there."""

import importlib.metadata
import socket

import numpy as np
import pytest

from impala_jax import suites
from impala_jax.commands import doctor, main
from impala_jax.environments import registry
from tests import counting


@pytest.fixture
def run(capsys):
  def run(*argv):
    code = main.main(['doctor', *argv])
    printed = capsys.readouterr()
    return code, printed.out, printed.err

  return run


def test_this_machine(run):
  code, out, err = run()
  assert (code, err) == (0, '')
  lines = {line[4:18].strip(): line for line in out.splitlines()}
  for of in ('impala_jax', 'JAX', 'disk', 'shared memory', 'loopback', 'Reverb', 'TLS'):
    assert of in lines, out
  assert 'cpu' in lines['JAX']
  assert 'suite catch: installed' in out


def test_what_is_missing_is_said_to_cost_something(run, monkeypatch):
  version = importlib.metadata.version

  def lacks(name):
    if name in ('matplotlib', 'cryptography'):
      raise importlib.metadata.PackageNotFoundError
    return version(name)

  monkeypatch.setattr(importlib.metadata, 'version', lacks)
  monkeypatch.setenv('HTTPS_PROXY', 'http://127.0.0.1:9')
  code, out, _ = run()
  assert code == 0  # Runs are possible.
  assert '--  plots          matplotlib is not installed: no learning_curve.png' in out
  assert '--  TLS ' in out
  assert 'https_proxy: no role talks to another through it' in out


def test_where_no_run_is_possible_it_ends_with_1(run, monkeypatch):
  def refuse(*args, **kwargs):
    raise OSError(99, 'Cannot assign requested address')

  monkeypatch.setattr(socket, 'create_server', refuse)
  monkeypatch.setattr(doctor, '_JAX', 'raise RuntimeError("no device")')
  code, out, _ = run()
  assert code == 1
  assert 'NO  JAX            cannot compute: RuntimeError: no device' in out
  assert 'NO  loopback' in out


def test_an_accelerator_that_hangs_does_not_hang_it(run, monkeypatch):
  monkeypatch.setattr(doctor, '_JAX', 'import time; time.sleep(60)')
  monkeypatch.setattr(doctor, '_SLOW', 0.5)
  code, out, _ = run()
  assert code == 1
  assert 'JAX did not come up within 0 s' in out


def test_a_suite_is_played(run):
  code, out, _ = run('catch')
  assert code == 0
  assert 'ok  begins         catch' in out
  assert 'ok  observation    float32[10, 5], 0.0 to 1.0' in out
  assert 'ms for each of 200 random ones, 20 episodes ended' in out


def test_a_suite_that_fails_says_why(run, monkeypatch):
  def make(level, seed):
    if level == 'broken':
      raise RuntimeError('no such map')
    return counting.CountingEnvironment(0, (3,), (False,), num_actions=3)

  monkeypatch.setattr(suites, '_suites', dict(suites._suites))
  registry.register('odd', make, levels=['fine', 'broken'])
  assert run('odd')[0] == 0
  code, out, _ = run('odd', '--level=broken')
  assert code == 1
  assert 'NO  level          broken: ' in out
  assert 'no such map' in out


def test_pictures_of_one_colour_are_pointed_at():
  frame = np.zeros((1, 72, 96, 3), np.uint8)
  (found,) = doctor._pictures({'frame': frame})
  assert 'of one colour' in found.words
  frame[0, 3, 3] = 7
  (found,) = doctor._pictures({'frame': frame})
  assert found.words == 'uint8[72, 96, 3], 0 to 7'


@pytest.mark.parametrize(
  ('argv', 'words'),
  [
    (['nope'], "environment.suite is 'nope'"),
    (['--level=x'], '--level needs a SUITE'),
    (['catch', '--level=x'], 'x'),
  ],
)
def test_mistakes(run, argv, words):
  code, out, err = run(*argv)
  assert code in (1, 2)
  assert words in out + err
  assert 'Traceback' not in err
