"""Bars: which axis, what is drawn of levels that failed, and that a file is made."""

import pathlib

import pytest

from impala_jax import config as config_lib
from impala_jax import suites
from impala_jax.environments import base, registry
from impala_jax.environments.dmlab import levels as dmlab30
from impala_jax.evaluation import evaluator, playing
from impala_jax.evaluation import report as evaluation_report
from impala_jax.reporting import bar_charts

pytest.importorskip('matplotlib')


def _report(suite, returns_by_level, errors=()):
  levels = tuple(returns_by_level)
  config = config_lib.Config(
    environment=config_lib.Environment(suite=suite, levels=levels)
  )
  results = [
    playing.LevelResult(
      i,
      3,
      [base.EpisodeEnd(i, r, 5, False) for r in returns],
      [],
      'EngineError: gone' if level in errors else '',
    )
    for i, (level, returns) in enumerate(returns_by_level.items())
  ]
  policy = evaluator.SavedPolicy({}, {'updates': 5, 'frames': 500}, pathlib.Path('x'))
  return evaluation_report.make(config, policy, results, episodes=3)


def _texts(axes):
  return [t.get_text() for t in axes.texts]


def test_scores_of_all_levels_on_one_axis(tmp_path, monkeypatch, figures):
  suite = registry.Suite(
    make=None, spec=None, scores=dmlab30.scores, reference=dmlab30.reference
  )
  monkeypatch.setitem(suites._suites, 'dmlab', suite)
  half = {x.train: [(x.random + x.human) / 2] * 3 for x in dmlab30.LEVELS}
  half['psychlab_visual_search'] = []
  path = tmp_path / 'bars.png'
  bar_charts.draw(_report('dmlab', half, ['psychlab_visual_search']), path)
  assert path.read_bytes()[:4] == b'\x89PNG'
  (figure,) = figures()
  (axes,) = figure.axes
  widths = [bar.get_width() for bar in axes.patches]
  assert widths == pytest.approx([0.0 if i == 21 else 50.0 for i in range(30)])
  assert [t.get_text() for t in axes.get_yticklabels()] == list(dmlab30.TEST_LEVELS)
  texts = _texts(axes)
  assert texts.count('50.0') == 29
  assert '  failed: 0 of 3 episodes' in texts
  assert {'random', 'human'} <= set(texts)
  title = figure.get_suptitle()
  assert 'after 500 frames (incomplete)' in title
  assert 'partial mean capped 50, partial levels 29' in title


def test_raw_returns_of_one_order_share_an_axis(tmp_path, figures):
  report = _report('atari', {'a': [5.0, 6.0, 7.0], 'b': [-12.0, -12.0, -15.0]})
  bar_charts.draw(report, tmp_path / 'bars.png')
  (axes,) = figures()[0].axes
  assert [bar.get_width() for bar in axes.patches] == pytest.approx([6.0, -13.0])
  low, high = axes.get_xlim()
  assert low < report['levels']['b']['ci95'][0]
  assert high > report['levels']['a']['ci95'][1]


def test_raw_returns_of_many_orders_have_axes_of_their_own(tmp_path, figures):
  report = _report('atari', {'a': [5.0, 6.0, 7.0], 'b': [4e3, 5e3, 6e3], 'c': []})
  bar_charts.draw(report, tmp_path / 'bars.png')
  axes = figures()[0].axes
  assert len(axes) == 3
  assert axes[0].get_xlim()[1] < 20 < 6_000 < axes[1].get_xlim()[1]


def test_a_single_episode_has_no_whiskers(tmp_path, figures):
  bar_charts.draw(_report('atari', {'a': [5.0]}), tmp_path / 'bars.png')
  (axes,) = figures()[0].axes
  assert '5.0  1 of 3 episodes' in _texts(axes)
