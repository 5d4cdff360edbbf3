"""Statistics with known answers, and what the JSON says of an evaluation."""

import json
import math
import pathlib

import numpy as np
import pytest

from impala_jax import config as config_lib
from impala_jax import suites
from impala_jax.environments import base, registry
from impala_jax.environments.dmlab import levels as dmlab30
from impala_jax.evaluation import evaluator, playing
from impala_jax.evaluation import report as evaluation_report

_POLICY = evaluator.SavedPolicy(
  {}, {'updates': 5, 'frames': 500}, pathlib.Path('x.msgpack')
)


def _config(suite, levels):
  return config_lib.Config(
    environment=config_lib.Environment(suite=suite, levels=tuple(levels))
  )


def _result(task_id, returns, planned=None, failures=(), error=''):
  episodes = [
    base.EpisodeEnd(task_id, r, 10 + i, i == 0) for i, r in enumerate(returns)
  ]
  planned = len(returns) if planned is None else planned
  return playing.LevelResult(task_id, planned, episodes, list(failures), error)


def test_statistics_by_hand():
  """t at 97.5 % with 2 degrees of freedom is 4.3027."""
  found = evaluation_report.statistics([1.0, 3.0, 8.0])
  error = math.sqrt(13 / 3)
  reach = 4.30265 * error
  assert found.pop('ci95') == pytest.approx([4 - reach, 4 + reach], rel=1e-5)
  assert found == pytest.approx(
    {
      'episodes': 3,
      'mean': 4.0,
      'standard_error': error,
      'median': 3.0,
      'min': 1.0,
      'max': 8.0,
    }
  )
  one = evaluation_report.statistics([2.5])
  assert (one['mean'], one['median'], one['episodes']) == (2.5, 2.5, 1)
  assert one['ci95'] is one['standard_error'] is None
  none = evaluation_report.statistics([])
  assert none.pop('episodes') == 0
  assert set(none.values()) == {None}


def test_intervals_of_levels_cover_the_truth_as_often_as_they_say():
  rng = np.random.default_rng(0)
  draws = rng.normal(3.0, 2.0, (2_000, 8))
  hits = 0
  for row in draws:
    low, high = evaluation_report.statistics(row.tolist())['ci95']
    hits += low <= 3.0 <= high
  assert abs(hits / 2_000 - 0.95) < 0.02


def test_bootstrap_of_a_mean_of_means():
  """Against the normal approximation: the variance of two independent means."""
  rng = np.random.default_rng(1)
  returns = {'a': rng.normal(10, 3, 400).tolist(), 'b': rng.normal(20, 5, 400).tolist()}
  middle = lambda means: {'middle': (means['a'] + means['b']) / 2}
  low, high = evaluation_report.bootstrap(returns, middle)['middle']
  spread = math.sqrt(np.var(returns['a']) / 400 + np.var(returns['b']) / 400) / 2
  center = (np.mean(returns['a']) + np.mean(returns['b'])) / 2
  assert (low + high) / 2 == pytest.approx(center, abs=0.2 * spread)
  assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.1)
  again = evaluation_report.bootstrap(returns, middle)
  assert again['middle'] == [low, high]


def test_a_bootstrap_of_too_little_says_nothing():
  figures = lambda means: {'x': sum(means.values())}
  assert evaluation_report.bootstrap({'a': [1.0, 2.0], 'b': [1.0]}, figures) == {}
  assert evaluation_report.bootstrap({}, figures) == {}


@pytest.fixture
def dmlab_suite(monkeypatch):
  """The scores without the engine."""
  suite = registry.Suite(
    make=None, spec=None, scores=dmlab30.scores, reference=dmlab30.reference
  )
  monkeypatch.setitem(suites._suites, 'dmlab', suite)


def test_dmlab30(dmlab_suite):
  """People's returns score 100, under the names of the test levels."""
  config = _config('dmlab', dmlab30.TRAINING_LEVELS)
  results = [
    _result(i, [x.human - 1, x.human + 1]) for i, x in enumerate(dmlab30.LEVELS)
  ]
  report = evaluation_report.make(config, _POLICY, results, episodes=2, seed=4)
  assert tuple(report['levels']) == dmlab30.TEST_LEVELS
  first = report['levels']['rooms_collect_good_objects_test']
  assert first['trained_on'] == 'rooms_collect_good_objects_train'
  assert (first['random'], first['reference']) == (0.073, 10.0)
  assert first['reference_is'] == 'human'
  assert first['score'] == pytest.approx(100.0)
  span = 10 - 0.073
  assert first['score_ci95'] == pytest.approx(
    [100 * (x - 0.073) / span for x in first['ci95']]
  )
  scores = report['scores']
  assert scores['mean_capped']['value'] == pytest.approx(100.0)
  low, high = scores['mean_capped']['ci95']
  # Capped: no draw exceeds 100, though half of the levels do.
  assert low < 99.5
  assert high <= 100.0
  assert scores['mean_uncapped']['ci95'][1] > 100.5
  assert report['complete']
  assert (report['episodes'], report['seed']) == (2, 4)
  assert report['checkpoint'] == {
    'path': 'x.msgpack',
    'updates': 5,
    'frames': 500,
    'wall_seconds': None,
  }
  assert config_lib.from_dict(report['config']) == config
  assert json.loads(json.dumps(report)) == report


def test_levels_that_are_not_complete_do_not_count_for_scores(dmlab_suite):
  config = _config('dmlab', dmlab30.TRAINING_LEVELS)
  results = [_result(i, [x.human] * 2) for i, x in enumerate(dmlab30.LEVELS)]
  cut = dmlab30.LEVELS[3]
  results[3] = _result(3, [cut.random], planned=2)
  failure = base.Failure(0, 7, 'aborted')
  results[7] = _result(7, [], planned=2, failures=[failure], error='EngineError: no')
  report = evaluation_report.make(config, _POLICY, results)
  assert report['scores']['partial_mean_capped']['value'] == pytest.approx(100.0)
  assert report['scores']['partial_levels']['value'] == 28
  assert not report['complete']
  half, failed = report['levels'][cut.test], report['levels'][dmlab30.TEST_LEVELS[7]]
  assert (half['complete'], half['episodes'], half['planned_episodes']) == (False, 1, 2)
  assert half['error'] is None
  assert (failed['mean'], failed['score'], failed['error']) == (
    None,
    None,
    'EngineError: no',
  )
  assert failed['engine_failures'] == ['aborted']


def test_time_limits_that_a_suite_does_not_tell(monkeypatch):
  config = _config('catch', ['catch'])
  suite = registry.find('catch')._replace(tells_time_limits=False)
  monkeypatch.setitem(suites._suites, 'catch', suite)
  report = evaluation_report.make(config, _POLICY, [_result(0, [1.0, -1.0])])
  assert report['levels']['catch']['ended_by_time_limit'] is None
  assert not registry.tells_time_limits('dmlab')
  assert not registry.tells_time_limits('procgen')


def test_levels_without_reference():
  config = _config('catch', ['catch'])
  report = evaluation_report.make(config, _POLICY, [_result(0, [1.0, -1.0, 1.0])])
  level = report['levels']['catch']
  assert level['returns'] == [1.0, -1.0, 1.0]
  assert level['score'] is level['score_ci95'] is level['reference'] is None
  assert level['mean_agent_steps'] == 11.0
  assert level['ended_by_time_limit'] == 1
  assert report['scores'] == {}
