"""Returns of a run: windows by level, scores of suites."""

import pytest

from impala_jax import config as config_lib
from impala_jax import suites
from impala_jax.environments import registry
from impala_jax.environments.dmlab import levels as dmlab30
from impala_jax.reporting import episodes


def test_windows_are_of_each_level():
  """However many episodes of another level end."""
  log = episodes.EpisodeLog(['slow', 'fast', 'never'], window=3)
  assert log.means() == {}
  assert log.mean() is None
  log.add(0, 100.0, 50)
  for i in range(10):
    log.add(1, float(i), 2)
  assert log.means() == {'slow': 100.0, 'fast': 8.0}
  assert log.count == 11
  assert log.mean() == (54.0, 26.0)  # Over levels, not over episodes.


def test_scores_of_a_run(monkeypatch):
  suite = registry.Suite(
    make=None, spec=None, scores=dmlab30.scores, reference=dmlab30.reference
  )
  monkeypatch.setitem(suites._suites, 'dmlab', suite)
  config = config_lib.Config(environment=config_lib.Environment(suite='dmlab'))
  log = episodes.EpisodeLog(dmlab30.TRAINING_LEVELS)
  for i, level in enumerate(dmlab30.LEVELS):
    log.add(i, level.human, 900)
  assert episodes.suite_scores(config, log.means()) == pytest.approx(
    {'mean_capped': 100.0, 'mean_uncapped': 100.0}
  )


@pytest.mark.parametrize('suite', ['catch', 'custom'])
def test_suites_without_scores(suite):
  """Also an environment that was handed over and has no suite at all."""
  config = config_lib.Config(environment=config_lib.Environment(suite=suite))
  assert episodes.suite_scores(config, {'x': 1.0}) == {}
