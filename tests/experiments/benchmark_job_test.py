"""The benchmark job of CI: what it calls slower, and what it says of mistakes."""

import json
import re

import pytest

from experiments.benchmarks import run
from impala_jax.runtime import versions

KEY = f'jax {versions.installed()["jax"]}'


def figure(low, median, high):
  return {'low': low, 'median': median, 'high': high}


@pytest.mark.parametrize(
  ('now', 'before', 'slower'),
  [
    (figure(0.9, 1.0, 1.1), figure(0.9, 1.0, 1.1), False),
    (figure(1.1, 1.2, 1.3), figure(0.9, 1.0, 1.05), False),  # Within the tolerance.
    (figure(1.4, 1.5, 1.6), figure(0.9, 1.0, 1.1), True),
    (figure(1.4, 1.5, 1.6), figure(0.9, 1.0, 1.45), False),  # The quartiles overlap.
    (figure(0.4, 0.5, 0.6), figure(0.9, 1.0, 1.1), False),
  ],
)
def test_slower_is_beyond_the_tolerance_and_the_noise(now, before, slower):
  found = run.compare({'vtrace': now}, {'vtrace': before}, tolerance=0.3)
  assert found == (['vtrace'] if slower else [])


def test_a_case_that_the_baseline_does_not_know(capsys):
  assert run.compare({'vtrace': figure(1, 1, 1)}, {}, tolerance=0.3) == []
  assert 'not in the baseline' in capsys.readouterr().err


def test_as_a_user_runs_it(tmp_path, capsys):
  path = tmp_path / 'baseline.json'
  arguments = ['--only=vtrace', '--repeats=3']
  assert run.main([*arguments, f'--write={path}']) == 0
  capsys.readouterr()
  known = json.loads(path.read_text())[KEY]['vtrace']
  assert 0 < known['low'] <= known['median'] <= known['high']
  # Whatever this machine does meanwhile, it is neither 100 times slower nor faster.
  for scale, status in ((100.0, 0), (0.01, 1)):
    scaled = {k: scale * v for k, v in known.items()}
    path.write_text(json.dumps({KEY: {'vtrace': scaled}}))
    assert run.main([*arguments, f'--baseline={path}']) == status
    printed = capsys.readouterr()
    assert json.loads(printed.out)['slower'] == ['vtrace'] * status
    assert ('SLOWER' in printed.err) == bool(status)


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    (None, 'is no baseline: .*No such file'),
    ('{', 'is no baseline'),
    ('[1]', 'is no baseline'),
    ('{"jax 0": {"vtrace": {"low": 1}}}', 'lacks low, median or high'),
    ('{"jax 0": {}}', f'has no figures of {KEY}: take them with --write='),
  ],
)
def test_mistakes(tmp_path, capsys, text, words):
  path = tmp_path / 'baseline.json'
  if text is not None:
    path.write_text(text)
  assert run.main(['--only=vtrace', f'--baseline={path}']) == 2
  printed = capsys.readouterr()
  assert re.search(words, printed.err), printed.err
  assert printed.err.count('\n') == 1
  assert not printed.out
