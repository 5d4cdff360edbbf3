"""Engines and their level cache, from the counts that actors report."""

import pytest

from impala_jax.distributed.control import board, protocol
from impala_jax.reporting import engine_figures


def described(found):
  return engine_figures.describe({f'engines/{k}': v for k, v in found.items()})


def test_a_cache_that_was_asked_for_nothing_may_be_unwritable():
  control = board.Board()
  totals = {'engines/resets': 1.0, 'engines/cache_unwritable': 2.0}
  control.report(protocol.Report('actor', 0, 0, totals))
  found = engine_figures.EngineFigures().update(control)
  assert 'cache_hit_rate' not in found
  assert 'CANNOT BE WRITTEN by 2 engines' in described(found)


def test_figures():
  control, figures = board.Board(), engine_figures.EngineFigures()

  def tell(index, incarnation=0, **counts):
    totals = {f'engines/{name}': value for name, value in counts.items()}
    control.report(protocol.Report('actor', index, incarnation, totals))
    return figures.update(control)

  assert figures.update(control) == {}
  assert tell(0, resets=0.0) == {}  # Of a suite without engines, or too early.
  assert tell(0, resets=2.0, reset_seconds=40.0) == {
    'resets': 2.0,
    'reset_seconds': 20.0,
  }
  cache = {'cache_hits': 3.0, 'cache_misses': 1.0, 'cache_unwritable': 1.0}
  found = tell(1, resets=2.0, reset_seconds=20.0, **cache)
  assert found['reset_seconds'] == 10.0  # Of the two since.
  assert found['cache_hit_rate'] == pytest.approx(0.75)
  assert (found['cache_misses'], found['cache_evictions']) == (1.0, 0.0)
  assert figures.update(control) == found  # The last word stands.
  assert 'level cache had 75% of the maps' in described(found)
  assert 'CANNOT BE WRITTEN by 1 engines' in described(found)
  # Another process of the same actor counts anew.
  assert tell(1, incarnation=1)['cache_unwritable'] == 1.0
