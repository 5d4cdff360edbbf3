"""Figures of inference servers, from what they report."""

import pytest

from impala_jax.distributed.control import board, protocol
from impala_jax.reporting import inference_figures


def _report(control, index, n, incarnation=0, **more):
  totals = {
    'requests': 10 * n, 'rows': 40 * n, 'batches': 5 * n, 'padding': 10 * n,
    'waited': 0.02 * n, 'refused': 0, **more,
  }  # fmt: skip
  gauges = {'clients': 3, 'environments': 12}
  control.report(protocol.Report('inference', index, incarnation, totals, gauges))


def test_rates_are_of_the_time_between_reports():
  control, figures = board.Board(), inference_figures.InferenceFigures()
  assert figures.update(control, 1.0) == {}
  assert inference_figures.describe({}) == ''
  for index in range(2):
    _report(control, index, 1)
  assert figures.update(control, 1.0)['clients'] == 6
  for index in range(2):
    _report(control, index, 3, refused=1)
  found = figures.update(control, 4.0)
  assert found == pytest.approx(
    {
      'requests_per_second': 10.0,
      'rows_per_second': 40.0,
      'batch_mean': 8.0,
      'padding': 0.2,
      'wait_ms': 2.0,
      'clients': 6,
      'environments': 24,
      'refused': 2,
    }
  )
  words = inference_figures.describe(
    {f'inference/{name}': value for name, value in found.items()}
  )
  assert words == (
    '10 requests/s of 6 actors, batches of 8.0, 2.0 ms of waiting each, 2 refused'
  )
  # Nothing new was heard: the last word stands, and its time counts later.
  assert figures.update(control, 4.0) == found
  _report(control, 0, 1, incarnation=1)
  assert figures.update(control, 1.0)['requests_per_second'] == 2.0
