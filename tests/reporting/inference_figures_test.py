"""Figures of inference servers, from what they report."""

import pytest

from impala_jax.distributed.control import board as control_lib
from impala_jax.reporting import inference_figures


def _report(control, index, n, incarnation=0, **more):
  totals = {
    'requests': 10 * n, 'rows': 40 * n, 'batches': 5 * n, 'padding': 10 * n,
    'waited': 0.02 * n, 'refused': 0, 'clients': 3, 'environments': 12, **more,
  }  # fmt: skip
  control.report('inference', index, incarnation, totals, [])


def test_rates_are_of_the_time_between_reports():
  control, figures = control_lib.Control(), inference_figures.InferenceFigures()
  assert figures.update(control, 1.0) == {}
  assert inference_figures.describe({}) == ''
  for index in range(2):
    _report(control, index, 1)
  assert figures.update(control, 1.0)['inference/clients'] == 6
  for index in range(2):
    _report(control, index, 3, refused=1)
  found = figures.update(control, 4.0)
  assert found == pytest.approx(
    {
      'inference/requests_per_second': 10.0,
      'inference/rows_per_second': 40.0,
      'inference/batch_mean': 8.0,
      'inference/padding': 0.2,
      'inference/wait_ms': 2.0,
      'inference/clients': 6,
      'inference/environments': 24,
      'inference/refused': 2,
    }
  )
  words = inference_figures.describe(found)
  assert words == (
    '10 requests/s of 6 actors, batches of 8.0, 2.0 ms of waiting each, 2 refused'
  )
  # Nothing new was heard: the last word stands, and its time counts later.
  assert figures.update(control, 4.0) == found
  _report(control, 0, 1, incarnation=1)
  assert figures.update(control, 1.0)['inference/requests_per_second'] == 2.0
