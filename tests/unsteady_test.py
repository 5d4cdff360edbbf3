"""An unsteady test runs twice at most, is named, and has few like it."""

import pathlib

import pytest

pytest_plugins = ['pytester']

_COMMON = """
import pathlib, pytest

def runs(name):
  path = pathlib.Path(name)
  path.write_text(path.read_text() + 'x' if path.exists() else 'x')
  return len(path.read_text())

@pytest.fixture
def fresh():
  return []

@pytest.mark.unsteady('not needed')
def test_passes():
  assert runs('passes') == 1
"""
_FAILS_ONCE = """
@pytest.mark.unsteady('a reason')
@pytest.mark.parametrize('n', range({}))
def test_fails_once(n, fresh):
  fresh.append(n)
  assert len(fresh) == 1
  assert runs(f'once{{n}}') == 2, 'the wait was over'
"""
_FAILS = """
@pytest.mark.unsteady('another reason')
def test_fails():
  runs('fails')
  assert False
"""
_NOT_MARKED = """
def test_not_marked():
  assert runs('not marked') == 2
"""


@pytest.fixture(params=[(), ('-n2',)], ids=['alone', 'xdist'])
def run(request, pytester):
  if request.param:
    pytest.importorskip('xdist')
  root = str(pathlib.Path(__file__).parents[1])
  pytester.makeconftest(
    f'import sys; sys.path.insert(0, {root!r}); from tests.unsteady import *'
  )
  pytester.makeini(
    '[pytest]\nmarkers =\n  unsteady(reason): as here\naddopts = --strict-markers'
  )

  def run(tests):
    pytester.makepyfile(_COMMON + tests)
    return pytester.runpytest_subprocess(
      '-p', 'no:cacheprovider', '-p', 'no:timeout', *request.param
    )

  run.folder = pytester.path
  return run


def test_those_that_pass_the_second_time_pass_and_are_named(run):
  result = run(_FAILS_ONCE.format(2))
  assert result.ret == 0
  result.assert_outcomes(passed=3)
  result.stdout.fnmatch_lines_random(
    [
      '*unsteady tests that failed once (at most 2)*',
      '*::test_fails_once[[]0]: *AssertionError',
      '*::test_fails_once[[]1]: *AssertionError',
      '  a reason',
    ]
  )


def test_a_third_fails_the_run(run):
  result = run(_FAILS_ONCE.format(3))
  assert result.ret == 1
  result.assert_outcomes(passed=4)


def test_one_that_fails_twice_fails(run):
  result = run(_FAILS)
  assert result.ret == 1
  result.assert_outcomes(passed=1, failed=1)
  assert (run.folder / 'fails').read_text() == 'xx'


def test_others_are_not_tried_again(run):
  result = run(_NOT_MARKED)
  assert result.ret == 1
  result.assert_outcomes(passed=1, failed=1)
  result.stdout.no_fnmatch_line('*failed once*')
