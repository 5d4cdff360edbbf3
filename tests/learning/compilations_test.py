"""Nothing is compiled once a run is under way."""

import dataclasses

import jax
import pytest

import impala_jax
from impala_jax import config as config_lib
from impala_jax import configs
from impala_jax.learning import learner as learner_lib

_COMPILED = '/jax/core/compile/backend_compile_duration'


@pytest.fixture
def compiled():
  """Learner updates that had been started at each compilation, in order."""
  updates_at = []
  started = 0
  listening = True  # A listener cannot be taken back by the public interface.
  update = learner_lib.Learner.update

  def counted(self, *args):
    nonlocal started
    started += 1
    return update(self, *args)

  def listen(event, duration, **kwargs):
    if listening and event == _COMPILED:
      updates_at.append(started)

  jax.clear_caches()
  jax.monitoring.register_event_duration_secs_listener(listen)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(learner_lib.Learner, 'update', counted)
    yield updates_at
  listening = False


def test_nothing_is_compiled_after_the_first_updates(compiled, tmp_path):
  """Checkpoints, records and partly filled policy calls included."""
  config = config_lib.override(
    configs.get('catch'),
    [
      'learner.checkpoint_interval=0.2',
      'learner.metrics_interval=0.1',
      'actor.envs_per_actor=6',
      'actor.inference_batch=4',
      'evaluator.enabled=false',
    ],
  )
  learner = dataclasses.replace(
    config.learner, total_frames=200 * config.frames_per_update
  )
  config = dataclasses.replace(config, learner=learner)
  result = impala_jax.train(config, run_dir=tmp_path)
  assert result.records[-1]['updates'] == 200
  assert compiled, 'the listener heard of no compilation at all'
  # The update itself is compiled in its first call.
  assert max(compiled) <= 1
