"""Figures of a run: windows by level, scores of suites, files."""

import json
import math

import pytest

import impala_jax
from impala_jax import config as config_lib
from impala_jax.environments import registry
from impala_jax.environments.dmlab import levels as dmlab30
from impala_jax.reporting import metrics
from impala_jax.runtime import files
from tests import counting


def test_windows_are_of_each_level():
  """However many episodes of another level end."""
  log = metrics.EpisodeLog(['slow', 'fast', 'never'], window=3)
  assert log.summary() == log.means() == {}
  log.add(0, 100.0, 50)
  for i in range(10):
    log.add(1, float(i), 2)
  assert log.means() == {'slow': 100.0, 'fast': 8.0}
  assert log.count == 11
  assert log.summary() == {
    'episode_return': 54.0,  # The mean over levels, not over episodes.
    'episode_length': 26.0,
    'episode_return/slow': 100.0,
    'episode_return/fast': 8.0,
  }


def test_one_level_needs_no_name():
  log = metrics.EpisodeLog(['only'])
  log.add(0, 1.0, 9)
  log.add(0, 3.0, 9)
  assert log.summary() == {'episode_return': 2.0, 'episode_length': 9.0}


def test_scores_of_a_run(monkeypatch):
  suite = registry.Suite(
    make=None, spec=None, scores=dmlab30.scores, reference=dmlab30.reference
  )
  monkeypatch.setitem(registry._suites, 'dmlab', suite)
  config = config_lib.Config(environment=config_lib.Environment(suite='dmlab'))
  log = metrics.EpisodeLog(dmlab30.TRAINING_LEVELS)
  for i, level in enumerate(dmlab30.LEVELS):
    log.add(i, level.human, 900)
  assert metrics.suite_scores(config, log.means()) == pytest.approx(
    {'mean_capped': 100.0, 'mean_uncapped': 100.0}
  )


@pytest.mark.parametrize('suite', ['catch', 'custom'])
def test_suites_without_scores(suite):
  """Also an environment that was handed over and has no suite at all."""
  config = config_lib.Config(environment=config_lib.Environment(suite=suite))
  assert metrics.suite_scores(config, {'x': 1.0}) == {}


def test_training_logs_scores_and_levels(tmp_path):
  lengths = {'two': 2, 'three': 3}
  registry.register(
    'counted',
    lambda level, seed: counting.CountingEnvironment(0, (lengths[level],)),
  )
  suite = registry._suites['counted']._replace(
    scores=lambda means: {'sum': sum(means.values())} if len(means) == 2 else {}
  )
  registry.register('counted', suite)
  config = config_lib.Config(
    environment=config_lib.Environment(
      suite='counted', levels=('two', 'three'), action_repeat=1
    ),
    network=config_lib.Network(torso='mlp', hidden=4, frame_stack=1),
    actor=config_lib.Actor(envs_per_actor=2, unroll_length=5),
    learner=config_lib.Learner(batch_size=4, total_frames=2_000),
    evaluator=config_lib.Evaluator(interval=0.1, episodes=1),
  )
  try:
    result = impala_jax.train(config, run_dir=tmp_path)
  finally:
    registry._suites.pop('counted')
  last = result.records[-1]
  by_level = [last[f'episode_return/{level}'] for level in lengths]
  assert last['score/sum'] == pytest.approx(sum(by_level))
  assert last['episode_return'] == pytest.approx(sum(by_level) / 2)
  evaluations = files.read_json_lines(tmp_path / 'evaluations.jsonl')
  # The first episodes: 1 + 2, and 1 + 2 + 3.
  assert evaluations[-1]['scores'] == {'sum': 9.0}
  seen = [r for r in result.records if 'evaluation_return' in r]
  for record in seen:
    assert record['evaluation_score/sum'] == 9.0
    assert record['evaluation_return/three'] == 6.0
  assert (tmp_path / 'level_curves.png').exists()


def test_a_writer_leaves_lines_that_everybody_reads(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, tensorboard=False)
  writer.write({'frames': 1, 'loss': math.nan, 'return': 2.5}, bottleneck='none')
  writer.close()
  lines = tmp_path / 'metrics.jsonl'
  lines.write_text(lines.read_text() + '{"frames": 2, "lo')
  assert files.read_json_lines(lines) == [{'frames': 1, 'loss': None, 'return': 2.5}]
  status = json.loads((tmp_path / 'status.json').read_text())
  assert status['bottleneck'] == 'none'
