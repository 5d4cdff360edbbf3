"""How the scaling benchmark reads its records, and that its figure can be drawn."""

import pytest

from experiments.benchmarks import scaling_benchmark, scaling_plot


def record(time, updates, **fields):
  return {
    'time': time, 'updates': updates, 'frames': 80 * updates, 'policy_lag_mean': 1.0,
    'learner_time/wait': 0.5, 'unrolls_lost': 0, **fields,
  }  # fmt: skip


def test_throughput_is_from_update_to_update():
  records = [
    record(100.0, 10), record(100.3, 10), record(100.5, 11), record(101.0, 11),
    record(102.5, 13), record(103.0, 13, unrolls_lost=2), record(109.0, 13),
  ]  # fmt: skip
  figures = scaling_benchmark.figures(records)
  # Two updates in the 2 s between the records that saw them.
  assert figures['steps_per_second'] == 80
  assert figures['updates'] == 2
  assert figures['learner_waits'] == 0.5
  assert figures['unrolls_lost'] == 0


def test_a_window_that_is_too_short_is_refused():
  with pytest.raises(SystemExit, match='make --seconds longer'):
    scaling_benchmark.figures([record(1.0, 1), record(2.0, 1), record(3.0, 2)])
  with pytest.raises(SystemExit, match='make --seconds longer'):
    scaling_benchmark.figures([])


def test_environment_sleeps_and_plays_catch():
  environment = scaling_benchmark.SlowCatch(0.0, seed=1)
  step = environment.reset()
  count = 0
  while not step.last():
    step = environment.step(1)
    count += 1
  assert count == 9
  assert step.reward in (-1, 1)


def test_figure(tmp_path):
  pytest.importorskip('matplotlib')
  points = [
    {
      'actors': n,
      'steps_per_second': 190.0 * n,
      'of_ideal': 1 - 0.01 * n,
      'learner_waits': 0.6,
    }
    for n in (1, 2, 4)
  ]
  report = {'points': points, 'cores': 2, 'arguments': {'step_ms': 5.0, 'envs': 4}}
  scaling_plot.draw(report, tmp_path / 'scaling.png')
  assert (tmp_path / 'scaling.png').read_bytes().startswith(b'\x89PNG')
