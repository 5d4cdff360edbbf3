"""The record and its glossary: what is written is declared, and the page is current."""

import pathlib

import pytest

import impala_jax
from impala_jax import config as config_lib
from impala_jax import configs, suites
from impala_jax.environments import registry
from impala_jax.reporting import record
from impala_jax.runtime import files
from tests import counting

_PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'metrics.md'


def _declared(lines):
  """Every key, and numbers of the types that the record says."""
  hints = {name: kind for name, kind, _ in record._fields(record.Record)}
  for line in lines:
    for key, value in line.items():
      figure = record.find(key)
      assert figure is not None, key
      assert figure.meaning, key
      kinds = {'int': int, 'float': float | None}[hints.get(key, 'float')]
      assert isinstance(value, kinds), (key, value)


def test_the_page_is_current():
  """Else: python -m impala_jax.reporting.record > docs/metrics.md"""
  assert _PAGE.read_text() == record.document()


def test_keys_of_ones_own_are_nobodys():
  assert record.find('kl').unit == 'nats'
  assert record.find('learner_time/wait') == record.find('actor_time/other')._replace(
    meaning='waiting for a batch, or for the other learners to have theirs'
  )
  assert record.find('score/anything').unit == 'score'
  for key in ('logit_loss', 'learner_time/', 'learner_time/x', 'level_returns'):
    assert record.find(key) is None, key


def test_a_run_writes_what_is_declared(tmp_path):
  config = config_lib.override(
    configs.get('catch'),
    [
      'transport.kind=local',
      'learner.total_frames=20_000',
      'evaluator.interval=0.5',
      'learner.metrics_interval=0.5',
      'learner.checkpoint_interval=1',
    ],
  )
  result = impala_jax.train(config, run_dir=tmp_path)
  lines = files.read_json_lines(tmp_path / 'metrics.jsonl')
  _declared(lines)
  last, status = lines[-1], files.read_json(tmp_path / 'status.json')
  assert last.items() <= status.items()
  known = {name for name, _, _ in record._fields(record.Status)}
  assert status.keys() - last.keys() == known
  assert {*record.METRICS, 'episode_return', 'queue_fill'} <= last.keys()
  for family, stages in (('learner', record.LEARNER_STAGES), ('actor', None)):
    shares = {k: v for k, v in last.items() if k.startswith(f'{family}_time/')}
    assert sum(shares.values()) == pytest.approx(1.0, abs=0.02)
    assert stages is None or {f'learner_time/{s}' for s in stages} == shares.keys()
  # As Python has it: the same, with the bottleneck.
  assert result.records[-1] == {**last, 'bottleneck': status['bottleneck']}


def test_training_logs_scores_and_levels(tmp_path):
  lengths = {'two': 2, 'three': 3}
  registry.register(
    'counted',
    lambda level, seed: counting.CountingEnvironment(0, (lengths[level],)),
  )
  suite = registry.find('counted')._replace(
    scores=lambda means: {'sum': sum(means.values())} if len(means) == 2 else {}
  )
  registry.register('counted', suite)
  config = config_lib.Config(
    environment=config_lib.Environment(suite='counted', levels=('two', 'three')),
    network=config_lib.Network(torso='mlp', hidden=4, frame_stack=1),
    actor=config_lib.Actor(envs_per_actor=2, unroll_length=5),
    learner=config_lib.Learner(batch_size=4, total_frames=2_000),
    evaluator=config_lib.Evaluator(interval=0.1, episodes=1),
  )
  try:
    result = impala_jax.train(config, run_dir=tmp_path)
  finally:
    suites._suites.pop('counted')
  _declared(files.read_json_lines(tmp_path / 'metrics.jsonl'))
  last = result.records[-1]
  by_level = [last[f'episode_return/{level}'] for level in lengths]
  assert last['score/sum'] == pytest.approx(sum(by_level))
  assert last['episode_return'] == pytest.approx(sum(by_level) / 2)
  evaluations = files.read_json_lines(tmp_path / 'evaluations.jsonl')
  # The first episodes: 1 + 2, and 1 + 2 + 3.
  assert evaluations[-1]['scores'] == {'sum': 9.0}
  seen = [r for r in result.records if 'evaluation_return' in r]
  for line in seen:
    assert line['evaluation_score/sum'] == 9.0
    assert line['evaluation_return/three'] == 6.0
  assert (tmp_path / 'level_curves.png').exists()
