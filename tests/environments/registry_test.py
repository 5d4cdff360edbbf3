import dataclasses
import json
import sys
import types as types_lib

import numpy as np
import pytest

from impala_jax import config as config_lib
from impala_jax import suites, types
from impala_jax.environments import registry
from impala_jax.settings import at_least, at_most, setting
from tests import counting


def _config(suite='atari', levels=('breakout',), envs=2, actors=1, batch=0, **settings):
  config = config_lib.Config(
    environment=config_lib.Environment(suite=suite, levels=levels),
    actor=config_lib.Actor(
      num_actors=actors, envs_per_actor=envs, inference_batch=batch
    ),
  )
  return config_lib.override(config, [f'{suite}.{k}={v}' for k, v in settings.items()])


def make_counting(level, seed):
  """Level `three` has episodes of 3 steps and so on; no picture."""
  del seed
  return counting.CountingEnvironment(0, ({'three': 3, 'four': 4, 'two': 2}[level],))


@dataclasses.dataclass(frozen=True)
class OwnSettings:
  """Of a suite that comes from outside."""

  action_repeat: int = setting(3, 'An action lasts so many frames.', at_least(1))
  actions: int = setting(4, 'There are so many actions.', at_least(2), at_most(9))
  words: tuple[str, ...] = setting((), 'These are said.')

  def relations(self):
    if len(self.words) > self.actions:
      yield 'words', f'must be at most own.actions ({self.actions})'


def make_with_settings(level, seed, settings):
  del level, seed
  return counting.CountingEnvironment(0, (3,), num_actions=settings.actions)


OWN = registry.from_maker(make_with_settings, ['only'], OwnSettings)


@pytest.fixture
def own_suite():
  registry.register('own', make_with_settings, ['only'], OwnSettings)
  yield 'own'
  suites._suites.pop('own')


@pytest.fixture
def counting_suite():
  registry.register('counting', make_counting, ['two', 'three', 'four'])
  yield 'counting'
  suites._suites.pop('counting')


def test_atari_of_one_game():
  config = _config(envs=3, batch=2)
  assert registry.environment_spec(config) == types.EnvironmentSpec(
    types.ArraySpec((84, 84, 1), np.dtype(np.uint8)), 4
  )
  made = registry.make_vector(config)
  assert made.spec == registry.environment_spec(config)
  made.reset(0)
  assert len(made.recv(10.0).env_ids) == 2
  made.close()
  made = registry.make_vector(config, evaluation=True, num_envs=3, level='breakout')
  made.reset(0)
  assert len(made.recv(10.0).env_ids) == 3
  made.close()


def test_lives_end_episodes_in_training_alone():
  def cuts(evaluation):
    made = registry.make_vector(_config(envs=1), evaluation=evaluation)
    made.reset(1)
    found = 0
    for t in range(100):
      ready = made.recv(10.0)
      last = ready.timestep.step_type[0] == types.StepType.LAST
      found += last and not ready.episodes
      made.send(ready.env_ids, np.array([t % 4], np.int32))
    made.close()
    return found

  assert cuts(False) >= 1
  assert cuts(True) == 0


def test_several_games_share_all_actions():
  config = _config(levels=('pong', 'skiing', 'breakout'), envs=4, actors=2)
  made = registry.make_vector(config, 1)
  assert made.spec == registry.environment_spec(config)
  assert made.spec.num_actions == 18
  # Environments 4 to 7 of all.
  assert sorted(made.task_ids.tolist()) == [0, 1, 1, 2]
  counting.check_vector_contract(made, 40, cut_episodes=True)
  made.close()


def test_settings_reach_the_games():
  config = _config(max_episode_frames=30, action_repeat=3, full_action_space='true')
  made = registry.make_vector(config)
  assert made.spec.num_actions == 18
  ends = counting.check_vector_contract(made, 30)
  assert {(e.length, e.truncated) for e in ends} == {(10, True)}
  made.close()


def test_levels_are_dealt_round_robin(counting_suite):
  config = _config(counting_suite, ('two', 'three', 'four'), envs=4, actors=3)
  dealt = []
  for actor_id in range(3):
    made = registry.make_vector(config, actor_id)
    dealt += made.task_ids.tolist()
    ends = counting.check_vector_contract(made, 12)
    assert {(e.task_id, e.length) for e in ends} <= {(0, 2), (1, 3), (2, 4)}
  assert dealt == [0, 1, 2] * 4


def test_one_level_for_evaluation(counting_suite):
  config = _config(counting_suite, ('two', 'three'), envs=2, batch=1)
  made = registry.make_vector(config, 0, evaluation=True, num_envs=5, level='three')
  assert made.task_ids.tolist() == [1] * 5
  made.reset(0)
  assert len(made.recv(1.0).env_ids) == 5
  with pytest.raises(config_lib.ConfigError, match="'four': must be one of"):
    registry.make_vector(config, level='four')


def test_a_suite_named_by_its_module():
  config = _config(f'{__name__}:make_counting', ('two',))
  assert registry.environment_spec(config).num_actions == 4
  ends = counting.check_vector_contract(registry.make_vector(config), 9)
  assert {e.length for e in ends} == {2}
  for bad in ('no_such_module:x', f'{__name__}:no_such_attribute'):
    with pytest.raises(config_lib.ConfigError, match=bad):
      registry.check(_config(bad))


def test_a_suite_with_its_own_vector(counting_suite):
  inner = registry.find(counting_suite)
  whole = []

  def make(config, tasks, evaluation):
    whole.append(evaluation)
    return inner.make(config, tasks, evaluation)

  suite = registry.Suite(make, inner.spec)
  registry.register(counting_suite, suite)
  config = _config(counting_suite, ('two',))
  assert registry.make_vector(config).num_envs == 2
  assert registry.make_vector(config, evaluation=True, num_envs=3).num_envs == 3
  assert whole == [False, True]
  assert registry.make_scene(config, 'two') is None


def test_a_suite_from_outside_has_settings(own_suite):
  config = _config(own_suite, ('only',), actions=6, words='a, b')
  assert config.of_suite(OwnSettings) == OwnSettings(actions=6, words=('a', 'b'))
  assert config.action_repeat == 3
  assert registry.environment_spec(config).num_actions == 6
  made = registry.make_vector(config)
  assert made.spec.num_actions == 6
  counting.check_vector_contract(made, 9)
  data = json.loads(json.dumps(config_lib.to_dict(config)))
  assert data['own'] == {'action_repeat': 3, 'actions': 6, 'words': ['a', 'b']}
  assert config_lib.from_dict(data) == config
  listed = {info.name: info for info in config_lib.describe_settings()}
  assert listed['own.actions'].allowed == 'must be at least 2 and must be at most 9'
  assert listed['own.words'].type == 'list of str'
  registry.register(own_suite, registry.find(own_suite)._replace(settings=None))
  with pytest.raises(config_lib.ConfigError, match=r'own\.\*: the suite own has none'):
    config_lib.from_dict(data)


def test_impossible_settings_of_a_suite_are_named_at_once(own_suite):
  config = _config(own_suite, ('other',), actions=1, action_repeat=0, words='a,b')
  for judge in (registry.check, registry.resolve, registry.make_vector):
    with pytest.raises(config_lib.ConfigError) as e:
      judge(config)
    assert str(e.value).splitlines() == [
      'own.action_repeat is 0: must be at least 1',
      'own.actions is 1: must be at least 2',
      "own.words is ('a', 'b'): must be at most own.actions (1)",
      "unknown level 'other': did you mean only?",
    ]
  # With levels that there are, the validation says all.
  broken = config_lib.override(config, ['loss.discount=2', 'environment.levels=only'])
  assert registry.resolve(broken) == broken
  with pytest.raises(config_lib.ConfigError) as e:
    config_lib.validate(broken)
  assert str(e.value).startswith('4 impossible setting(s)')


def test_settings_of_a_suite_named_by_its_module():
  name = f'{__name__}:OWN'
  config = _config(name, ('only',), actions=5)
  assert registry.environment_spec(config).num_actions == 5
  data = json.loads(json.dumps(config_lib.to_dict(config)))
  assert data[name]['actions'] == 5
  assert config_lib.from_dict(data) == config


def test_a_saved_suite_that_is_not_registered_here(own_suite):
  data = config_lib.to_dict(_config(own_suite, ('only',), actions=6))
  suites._suites.pop(own_suite)
  with pytest.raises(config_lib.ConfigError) as e:
    config_lib.from_dict(data)
  assert "environment.suite is 'own': known are atari" in str(e.value)
  assert 'registry.register' in str(e.value)
  registry.register(own_suite, make_with_settings, ['only'], OwnSettings)


def test_settings_that_no_text_can_give_are_refused(monkeypatch):
  @dataclasses.dataclass(frozen=True)
  class Plain:
    steps: int = 1

  @dataclasses.dataclass(frozen=True)
  class Odd:
    steps: complex = setting(1j, 'So many.')

  @dataclasses.dataclass
  class Loose:
    steps: int = setting(1, 'So many.')

  for settings, words in (
    (Plain, r'Plain\.steps must be made by `settings.setting`'),
    (Odd, r'Odd\.steps is of type .*complex.*: must be bool, int'),
    (Loose, 'must be a frozen dataclass'),
    (dict, 'must be a frozen dataclass'),
  ):
    with pytest.raises(TypeError, match=words):
      registry.register('own', make_with_settings, settings=settings)
  # One that is not registered, but found, is judged as it is used.
  module = types_lib.SimpleNamespace(SUITE=OWN._replace(settings=Plain))
  monkeypatch.setitem(sys.modules, 'loose_module', module)
  with pytest.raises(TypeError, match=r'Plain\.steps must be made'):
    config_lib.validate(_config('loose_module:SUITE'))
  for name in ('loss', ''):
    with pytest.raises(ValueError, match='must be no section of a configuration'):
      registry.register(name, make_counting)
  assert not {'own', 'loss', ''} & set(suites.names())


def test_patience_with_engines():
  config = _config('dmlab', ('lt_chasm',), reset_timeout=7)
  assert registry.engine_settings(config).reset_timeout == 7
  assert registry.engine_settings(config).step_timeout == 60
  # Of a suite that does not say.
  assert registry.engine_settings(_config()).reset_timeout == 300


def test_scenes(counting_suite):
  cases = [('atari', 'pong', (210, 160, 3)), ('catch', 'catch', (160, 80, 3))]
  for suite, level, shape in cases:
    scene = registry.make_scene(_config(suite, (level,)), level)
    assert scene is not None
    counting.check_vector_contract(scene, 15)
    frame = scene.frame()
    assert (frame.shape, frame.dtype) == (shape, np.uint8)
    scene.close()
  assert registry.make_scene(_config(counting_suite, ('two',)), 'two') is None


def test_unknown_names_are_all_listed(counting_suite):
  with pytest.raises(config_lib.ConfigError) as e:
    registry.check(_config(levels=('pnog', 'pong', 'warlords')))
  assert "'pnog': did you mean pong" in str(e.value)
  assert "'warlords' has no mode" in str(e.value)
  with pytest.raises(config_lib.ConfigError, match="'thre': did you mean three"):
    registry.environment_spec(_config(counting_suite, ('thre',)))
  for name, hint in (('atary', 'did you mean atari'), ('zzz', 'known are atari, ')):
    with pytest.raises(config_lib.ConfigError, match=hint):
      registry.make_vector(_config(name))
  assert set(suites.names()) >= {'atari', 'catch', counting_suite}


def test_random_seeds_differ():
  seeds = {
    registry.random_seed(s, a, i) for s in range(5) for a in range(20) for i in range(3)
  }
  assert len(seeds) == 300
  assert all(0 <= s < 2**31 for s in seeds)
  assert registry.random_seed(1, 2, 0) == registry.random_seed(1, 2)


def test_configurations_stay_as_they_are():
  config = _config()
  before = dataclasses.asdict(config)
  registry.environment_spec(config)
  assert dataclasses.asdict(config) == before
