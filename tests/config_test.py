"""Configuration: nothing unknown or impossible gets through, all said at once."""

import dataclasses
import json

import pytest

from impala_jax import config as config_lib
from impala_jax import config_validation, configs


def test_json_round_trip_of_every_named_configuration():
  for name in configs.names():
    config = configs.get(name)
    assert config.name == name
    text = json.dumps(config_lib.to_dict(config))
    assert config_lib.from_dict(json.loads(text)) == config
    config_validation.validate(config)


def test_override_reads_every_kind_of_field():
  config = config_lib.override(
    config_lib.Config(),
    ['learner.total_frames=2e6', 'environment.levels=pong, qbert', 'seed=7',
     'evaluator.video=false', 'optimizer.learning_rate=1e-3', 'network.torso=deep'],
  )  # fmt: skip
  assert config.learner.total_frames == 2_000_000
  assert config.environment.levels == ('pong', 'qbert')
  assert config.seed == 7
  assert config.evaluator.video is False
  assert config.optimizer.learning_rate == 1e-3
  assert config.network.torso == 'deep'


def test_all_bad_settings_are_named_at_once():
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.override(
      config_lib.Config(),
      ['learner.batchsize=3', 'loss.discount=much', 'nonsense', 'actor=1', 'seed=1.5'],
    )
  text = str(error.value)
  assert 'did you mean learner.batch_size' in text
  assert "loss.discount='much': not a valid float" in text
  assert "'nonsense': write section.field=value" in text
  assert 'actor is a section' in text
  assert "seed='1.5': not a valid int" in text


def test_all_impossible_settings_are_named_at_once_with_the_arithmetic():
  config = config_lib.override(
    config_lib.Config(),
    ['learner.batch_size=6', 'loss.discount=1.5', 'optimizer.name=sgd',
     'loss.c_clip=2', 'actor.inference_batch=40', 'transport.queue_batches=0'],
  )  # fmt: skip
  with pytest.raises(config_lib.ConfigError) as error:
    config_validation.validate(config, local_devices=4)
  text = str(error.value)
  assert text.startswith('6 impossible setting(s)')
  assert '6 = 1 x 4 + 2' in text
  assert 'loss.discount is 1.5: must lie in [0, 1]' in text
  assert "optimizer.name is 'sgd': must be one of rmsprop, adam" in text
  assert 'loss.c_clip is 2.0: must not exceed loss.rho_clip (1.0)' in text
  assert 'must not exceed actor.envs_per_actor (32)' in text
  assert 'transport.queue_batches is 0: must be at least 1' in text


def test_more_updates_than_a_learner_can_count_are_impossible():
  settings = ['learner.total_frames=1e12', 'learner.batch_size=1']
  with pytest.raises(config_lib.ConfigError, match=r'below 2\^31 updates of 80 frames'):
    config_validation.validate(config_lib.override(config_lib.Config(), settings))


def test_more_levels_than_environments_is_impossible():
  config = config_lib.override(
    config_lib.Config(), ['environment.levels=a,b,c', 'actor.envs_per_actor=2']
  )
  with pytest.raises(config_lib.ConfigError, match='1 actors x 2 = 2'):
    config_validation.validate(config)


@pytest.mark.parametrize(
  ('settings', 'least', 'words'),
  [
    # A full queue, or the environments of all actors.
    (['transport.queue_batches=3'], 5, 'transport.queue_batches + 2 = 5'),
    (['actor.num_actors=20'], 20, '640 environments / learner.batch_size = 20 updates'),
  ],
)
def test_a_limit_of_lag_that_nothing_could_keep_is_impossible(settings, least, words):
  def check(limit):
    config_validation.validate(
      config_lib.override(
        config_lib.Config(), [*settings, f'learner.max_policy_lag={limit}']
      )
    )

  check(0)
  check(least)
  for limit in (1, least - 1):
    with pytest.raises(config_lib.ConfigError) as error:
      check(limit)
    assert f'learner.max_policy_lag is {limit}: must be 0' in str(error.value)
    assert f'at least {least}' in str(error.value)
    assert words in str(error.value)
  with pytest.raises(config_lib.ConfigError, match='max_policy_lag is -1: must not be'):
    check(-1)


def test_impossible_settings_of_inference_are_named_at_once():
  config = config_lib.override(
    config_lib.Config(),
    ['inference.servers=3', 'actor.num_actors=2', 'inference.max_batch=16',
     'inference.max_environments=31', 'inference.deadline_ms=20000',
     'actor.platform=gpu', 'transport.kind=local'],
  )  # fmt: skip
  with pytest.raises(config_lib.ConfigError) as error:
    config_validation.validate(config)
  text = str(error.value)
  assert text.startswith('6 impossible setting(s)')
  assert 'must not exceed actor.num_actors (2)' in text
  assert 'must hold what one actor asks at once, 32 environments' in text
  assert 'must be 0 or at least the 32 of the actors dealt to one server' in text
  assert 'inference.deadline_ms is 20000.0: must be at most 10,000' in text
  assert "actor.platform is 'gpu': has no meaning with inference.servers" in text
  assert "transport.kind 'local' has not" in text
  for setting in ('inference.servers=-1', 'inference.platform=cuda',
                  'actor.platform=cuda', 'inference.max_batch=0'):  # fmt: skip
    config = config_lib.override(config_lib.Config(), [setting])
    with pytest.raises(config_lib.ConfigError, match=setting.split('=')[0]):
      config_validation.validate(config)


def test_room_of_inference_servers():
  def room(*settings):
    config = config_lib.override(config_lib.Config(), settings)
    config_validation.validate(config)
    return config.inference_environments

  assert room() == 0
  # Twice what is dealt to the fullest.
  assert room('inference.servers=2', 'actor.num_actors=5') == 2 * 3 * 32
  assert room('inference.servers=1', 'inference.max_environments=100') == 100


def test_unknown_fields_of_a_saved_configuration_are_refused():
  data = config_lib.to_dict(config_lib.Config())
  data['loss']['gama'] = 1
  with pytest.raises(config_lib.ConfigError, match=r'loss\.gama'):
    config_lib.from_dict(data)


def test_unknown_name_of_a_configuration_suggests_near_ones():
  with pytest.raises(config_lib.ConfigError, match=r'did you mean .*pong'):
    configs.get('pongg')


def test_derived_numbers():
  config = configs.get('paper_atari_shallow')
  assert config.frames_per_update == 32 * 20 * 4
  assert config.total_updates == 78_125
  assert config.queue_capacity == 64


def test_configurations_cannot_be_changed_in_place():
  with pytest.raises(dataclasses.FrozenInstanceError):
    config_lib.Config().seed = 2  # type: ignore[misc]
