import dataclasses
import difflib
import logging
import sys

import numpy as np
import pytest

from impala_jax import config as config_lib
from impala_jax import types
from impala_jax.environments import base, registry, specs
from impala_jax.environments.dmlab import environment as dmlab
from impala_jax.environments.dmlab import levels as dmlab30
from impala_jax.environments.dmlab import suite as dmlab_suite
from tests import counting
from tests import fake_deepmind_lab as fake

PICTURES = (
  'psychlab_arbitrary_visuomotor_mapping',
  'psychlab_continuous_recognition',
)


@pytest.fixture(autouse=True)
def engine(monkeypatch):
  fake.install(monkeypatch)


def make_config(*levels, envs=2, batch=0, **settings):
  small = {'frame_width': 16, 'frame_height': 12, 'level_cache_gib': 0.0}
  return config_lib.Config(
    environment=config_lib.Environment(suite='dmlab', levels=levels),
    actor=config_lib.Actor(envs_per_actor=envs, inference_batch=batch),
    suite_settings=dmlab_suite.Settings(**{**small, **settings}),
  )


@pytest.mark.parametrize('action_set', ['default', 'extended'])
def test_spec_needs_no_engine(action_set, monkeypatch):
  config = make_config('lt_chasm', action_set=action_set)
  made = dmlab.make('lt_chasm', 0, **dmlab_suite.engine_settings(config, False))
  assert registry.environment_spec(config) == specs.environment_spec(made)
  assert made.observation_spec()['frame'].shape == (12, 16, 3)
  monkeypatch.setitem(sys.modules, 'deepmind_lab', None)
  assert registry.environment_spec(config).num_actions == len(made._actions)


def test_every_setting_reaches_the_engine():
  config = make_config(
    'explore_goal_locations_small',
    action_repeat=3,
    action_set='extended',
    frame_width=24,
    frame_height=20,
    dataset_path='dummy',
    level_cache='/somewhere',
    level_cache_gib=2.0,
  )
  assert dmlab_suite.engine_settings(config, True) == {
    'action_set': 'extended',
    'action_repeat': 3,
    'width': 24,
    'height': 20,
    'evaluation': True,
    'level_cache': '/somewhere',
    'level_cache_gib': 2.0,
    'episode_seeds': 0,
    'dataset_path': 'dummy',
  }


def test_the_vector_of_an_actor():
  config = make_config('rooms_watermaze', 'language_execute_random_task', envs=3)
  made = registry.make_vector(config, 1)
  try:
    assert made.spec == registry.environment_spec(config)
    assert made.task_ids.tolist() == [1, 0, 1]
    ends = counting.check_vector_contract(made, 40)
    # 120 frames: 30 steps. FIRE adds 1,000 to each of those that it was chosen in.
    assert {e.length for e in ends} == {30}
    assert {e.episode_return % 1000 for e in ends} == {120.0}
    assert not any(e.truncated for e in ends)
  finally:
    made.close()


def test_instructions_come_as_ids_of_the_level_that_has_them():
  config = make_config('rooms_watermaze', 'language_execute_random_task')
  made = registry.make_vector(config)
  try:
    made.reset(0)
    found = {}
    while len(found) < 2:
      ready = made.recv(60.0)
      for row, i in enumerate(ready.env_ids.tolist()):
        found[i] = ready.timestep.observation['instruction'][row]
    assert not found[0].any()
    assert found[1].any()
  finally:
    made.close()


def test_evaluation_plays_the_test_versions():
  config = make_config('rooms_collect_good_objects_train', 'rooms_watermaze')
  names = lambda evaluation: [
    engine.kwargs['level'] for engine in pool_of(config, evaluation)._specs
  ]
  assert names(False) == ['rooms_collect_good_objects_train', 'rooms_watermaze']
  assert names(True) == ['rooms_collect_good_objects_test', 'rooms_watermaze']
  # The engine lets only evaluations play it.
  made = pool_of(config, True, [0])
  try:
    made.reset(0)
    assert made.recv(60.0).env_ids.tolist() == [0]
  finally:
    made.close()


def pool_of(config, evaluation, tasks=(0, 1)):
  made = dmlab_suite.SUITE.make(config, tasks, evaluation)
  if len(tasks) > 1:
    made.close()
  return made


@pytest.mark.parametrize('prefix', ['', dmlab30.PREFIX])
def test_held_out_levels_are_not_trained_on(prefix):
  level = f'{prefix}rooms_exploit_deferred_effects_test'
  with pytest.raises(config_lib.ConfigError) as e:
    registry.make_vector(make_config(level))
  assert repr(level) in str(e.value)
  assert 'train on rooms_exploit_deferred_effects_train' in str(e.value)


def test_a_crash_is_reported_with_level_and_seed():
  made = registry.make_vector(make_config('fake/abort_at_step_3', envs=1))
  try:
    made.reset(4)
    ready = made.recv(60.0)
    for _ in range(3):
      assert not ready.failures
      made.send(ready.env_ids, np.zeros(1, np.int32))
      ready = made.recv(60.0)
    assert ready.restarted == [0]
    failures = ready.failures
    (failure,) = failures
    assert (failure.env_id, failure.task_id) == (0, 0)
    for words in ('fake/abort_at_step_3', 'episode seed', 'SIGABRT', 'PANIC'):
      assert words in failure.cause
  finally:
    made.close()


def test_a_level_that_the_engine_does_not_have_is_not_tried_again():
  made = registry.make_vector(make_config('demos/no_such_level', envs=1))
  try:
    made.reset(0)
    with pytest.raises(base.EngineError, match=r'demos/no_such_level.*not found'):
      made.recv(60.0)
    assert made.stats()['restarts'] == 0
  finally:
    made.close()


def test_scene():
  scene = registry.make_scene(make_config('rooms_watermaze'), 'rooms_watermaze')
  try:
    scene.reset(0)
    ready = scene.recv(60.0)
    np.testing.assert_array_equal(scene.frame(), ready.timestep.observation['frame'][0])
  finally:
    scene.close()


def test_levels_there_are():
  for level in (
    *dmlab30.TRAINING_LEVELS,
    *dmlab30.TEST_LEVELS,
    'seekavoid_arena_01',
    'nav_maze_static_02',
    'lt_chasm',
    'contributed/psychlab/harlow',
    'demos/random_maze',
    'contributed/dmlab30/rooms_watermaze',
  ):
    assert dmlab_suite.problem(level) is None, level
  cases = {
    'rooms_watermase': 'rooms_watermaze',
    'Rooms_Watermaze': 'rooms_watermaze',
    'contributed/dmlab30/rooms_watermase': 'rooms_watermaze',
    'seekavoid_arena': 'seekavoid_arena_01',
    'dmlab-30': 'dmlab30',
  }
  for level, near in cases.items():
    text = dmlab_suite.problem(level)
    assert repr(level) in text
    assert f'did you mean {near}' in text
  assert not difflib.get_close_matches('pong', dmlab30.TRAINING_LEVELS)
  assert 'known are rooms_collect_good_objects_train' in dmlab_suite.problem('pong')


def resolved(*levels, **settings):
  config = registry.resolve(make_config(*levels, **settings))
  assert config == dataclasses.replace(
    config,
    environment=dataclasses.replace(
      make_config(*levels, **settings).environment, levels=config.environment.levels
    ),
  )
  return config.environment.levels


def test_the_group_is_written_out():
  assert resolved('dmlab30', dataset_path='dummy') == dmlab30.TRAINING_LEVELS
  assert len(dmlab30.TRAINING_LEVELS) == 30
  mixed = resolved('lt_chasm', 'dmlab30', 'rooms_watermaze', dataset_path='dummy')
  assert mixed == ('lt_chasm', *dmlab30.TRAINING_LEVELS)


@pytest.mark.parametrize(
  ('levels', 'words'),
  [
    (
      ['rooms_collect_good_objects_test'],
      'is held out for evaluation: train on rooms_',
    ),
    (['lt_chasm', 'lt_chasm'], 'must name each once'),
    (['dmlab30', 'dmlab30'], 'must name each once'),
    (['rooms_watermaze', 'contributed/dmlab30/rooms_watermaze'], 'are one: name it'),
  ],
)
def test_levels_that_cannot_be_trained_on(levels, words):
  with pytest.raises(config_lib.ConfigError, match=words):
    resolved(*levels, dataset_path='dummy')


def test_levels_that_the_engine_has_not(monkeypatch, tmp_path):
  """Where its folder is known; another machine's may have others."""
  folder = tmp_path / 'baselab' / 'game_scripts' / 'levels'
  (folder / 'contributed' / 'dmlab30').mkdir(parents=True)
  for name in ('contributed/dmlab30/rooms_watermaze', 'lt_chasm'):
    (folder / f'{name}.lua').touch()
  monkeypatch.setattr(dmlab, 'levels_folder', lambda: folder)
  assert resolved('rooms_watermaze', 'lt_chasm') == ('rooms_watermaze', 'lt_chasm')
  with pytest.raises(config_lib.ConfigError) as error:
    resolved('lt_chasm', 'demos/no_such', 'nav_maze_static_01')
  lines = str(error.value).splitlines()
  assert [line.partition(' is not')[0] for line in lines] == [
    "level 'demos/no_such'",
    "level 'nav_maze_static_01'",
  ]
  assert str(folder / 'demos/no_such.lua') in lines[0]
  config = registry.resolve(make_config('demos/no_such'), elsewhere=True)
  assert config.environment.levels == ('demos/no_such',)


def test_levels_without_their_pictures(tmp_path, caplog):
  with pytest.raises(config_lib.ConfigError) as e:
    resolved('dmlab30')
  for words in (*PICTURES, 'Brady', 'README.md', 'skip_unavailable_levels'):
    assert words in str(e.value)
  with caplog.at_level(logging.WARNING):
    left = resolved('dmlab30', skip_unavailable_levels=True)
  assert left == tuple(x for x in dmlab30.TRAINING_LEVELS if x not in PICTURES)
  assert len(left) == 28
  assert all(level in caplog.text for level in PICTURES)
  with pytest.raises(config_lib.ConfigError, match='Brady'):
    resolved(*PICTURES, skip_unavailable_levels=True)  # Nothing would be left.
  (tmp_path / '0001.png').touch()
  assert resolved('dmlab30', dataset_path=str(tmp_path)) == dmlab30.TRAINING_LEVELS


def test_all_problems_at_once():
  with pytest.raises(config_lib.ConfigError) as e:
    resolved('dmlab30', action_set='ten', frame_width=30, frame_height=0)
  for words in (
    "dmlab.action_set is 'ten': must be one of default, extended",
    'dmlab.frame_width is 30: must be a positive multiple of 4',
    'dmlab.frame_height is 0',
    'Brady',
  ):
    assert words in str(e.value)


def test_unknown_levels_are_refused_by_resolve():
  with pytest.raises(config_lib.ConfigError, match="'pong'"):
    resolved('dmlab30', 'pong', dataset_path='dummy')


def test_without_the_engine(monkeypatch):
  monkeypatch.setitem(sys.modules, 'deepmind_lab', None)
  with pytest.raises(config_lib.ConfigError) as e:
    resolved('dmlab30')
  for words in (
    'deepmind_lab',
    'docs/users/build.md',
    'github.com/google-deepmind/lab',
    '--suite=doom',
  ):
    assert words in str(e.value)
  assert str(e.value).count('\n') <= 4


def test_scores():
  human = {x.test: x.human for x in dmlab30.LEVELS}
  found = registry.scores(make_config('rooms_watermaze'), human)
  assert found['mean_capped'] == pytest.approx(100)


def test_episodes_of_bounded_seeds(monkeypatch):
  """Only training: an evaluation's episodes are its own."""
  config = make_config('rooms_watermaze', episode_seeds=7)
  assert dmlab_suite.engine_settings(config, False)['episode_seeds'] == 7
  assert dmlab_suite.engine_settings(config, True)['episode_seeds'] == 0


def test_spec_of_an_unknown_action_set():
  with pytest.raises(config_lib.ConfigError, match="action_set is 'ten'"):
    registry.environment_spec(make_config('lt_chasm', action_set='ten'))


def test_spec_is_that_of_the_issue():
  config = config_lib.Config(
    environment=config_lib.Environment(suite='dmlab', levels=('lt_chasm',))
  )
  assert registry.environment_spec(config) == types.EnvironmentSpec(
    {
      'frame': types.ArraySpec((72, 96, 3), np.dtype(np.uint8)),
      'instruction': types.ArraySpec((16,), np.dtype(np.int32)),
    },
    9,
  )
