"""A suite of levels one of which keeps failing: the run goes on, and says so."""

import dataclasses

import pytest

from impala_jax import components, configs
from impala_jax import config as config_lib
from impala_jax.distributed.roles import all_in_one
from impala_jax.environments import base
from impala_jax.environments.dmlab import suite as dmlab_suite
from tests import fake_deepmind_lab as fake


def train(monkeypatch, *levels):
  """The records of a run of small engines, two environments of each level.

  It goes on until a level is lost.
  """
  fake.install(monkeypatch)
  config = config_lib.override(
    configs.get('catch'),
    [
      'environment.suite=dmlab',
      f'environment.levels={",".join(levels)}',
      'network.instructions=true',
      'network.torso=mlp',
      'network.hidden=8',
      'actor.num_actors=1',
      f'actor.envs_per_actor={2 * len(levels)}',
      'actor.unroll_length=5',
      'actor.inference_batch=0',
      'learner.batch_size=4',
      'learner.total_frames=1e8',
      'learner.metrics_interval=0.2',
      'transport.kind=local',
      'evaluator.enabled=false',
    ],
  )
  settings = dmlab_suite.Settings(
    frame_width=8, frame_height=8, level_cache_gib=0.0, engine_restarts=0
  )
  config = dataclasses.replace(config, suite_settings=settings)
  made = []
  lost = lambda: bool(made) and made[-1].record.levels_lost > 0
  all_in_one.run(components.build(config), None, lost, made.append)
  return made


def test_the_others_are_trained_on(monkeypatch):
  """The level works for an episode of 30 steps; each engine fails at its second."""
  levels = ('fake/plain', 'fake/abort_at_reset_2')
  made = train(monkeypatch, *levels)
  last = made[-1]
  assert last.record.environments_given_up == 2
  assert last.record.levels_lost == 1
  assert last.record.level_returns.keys() == {'fake/plain'}
  assert last.given_up == [
    'fake/abort_at_reset_2: given up by 2 environment(s), none plays it'
  ]


def test_a_level_that_never_worked_ends_the_run(monkeypatch):
  with pytest.raises(base.EngineMistake, match=r'fake/abort_at_step_2.* never worked'):
    train(monkeypatch, 'fake/plain', 'fake/abort_at_step_2')
