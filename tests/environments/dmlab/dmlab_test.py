"""The adapter against a fake engine that behaves, and breaks, like the real one."""

import os
import pathlib
import signal
import subprocess
import sys

import dm_env
import numpy as np
import pytest

from impala_jax import types
from impala_jax.environments import instruction_ids, specs
from impala_jax.environments.dmlab import actions as dmlab_actions
from impala_jax.environments.dmlab import environment as dmlab
from tests import fake_deepmind_lab as fake

SMALL = {'width': 16, 'height': 12, 'level_cache_gib': 0.0}


@pytest.fixture(autouse=True)
def engine(monkeypatch):
  fake.install(monkeypatch)


def make(level='rooms_watermaze', seed=0, **settings):
  return dmlab.make(level, seed, **{**SMALL, **settings})


def seconds(number):
  return {'episodeLengthSeconds': str(number)}


def lab():
  """The fake engine of the last environment."""
  return fake.instances[-1]


def play(environment, steps, action=0):
  return [environment.step(action) for _ in range(steps)]


def test_specs_are_those_of_what_comes():
  environment = make(width=24, height=16)
  assert specs.environment_spec(environment) == types.EnvironmentSpec(
    {
      'frame': types.ArraySpec((16, 24, 3), np.dtype(np.uint8)),
      'instruction': types.ArraySpec((16,), np.dtype(np.int32)),
    },
    9,
  )
  for step in play(environment, 3):
    for name, spec in environment.observation_spec().items():
      spec.validate(step.observation[name])


def test_default_resolution():
  environment = dmlab.make('lt_chasm', 0, level_cache_gib=0.0)
  assert environment.reset().observation['frame'].shape == (72, 96, 3)


def test_episode():
  environment = make(config=seconds(0.4))  # 24 frames.
  steps = play(environment, 9)
  assert [int(s.step_type) for s in steps] == [0, 1, 1, 1, 1, 1, 2, 0, 1]
  assert [s.reward for s in steps] == [None, *[4.0] * 6, None, 4.0]
  assert [s.discount for s in steps] == [None, *[1.0] * 5, 0.0, None, 1.0]
  # The action after a LAST step begins an episode and is not played.
  assert len(lab().actions) == 7
  assert len(lab().resets) == 2


def test_last_step_keeps_the_last_frame_and_its_reward():
  environment = make(config=seconds(0.15))  # 9 frames: two steps and one of 1 frame.
  steps = play(environment, 4)
  assert steps[3].last()
  assert steps[3].reward == 1.0  # The engine stopped inside `num_steps`.
  for name in ('frame', 'instruction'):
    np.testing.assert_array_equal(
      steps[3].observation[name], steps[2].observation[name]
    )
  assert (steps[2].observation['frame'] != steps[1].observation['frame']).any()


def test_earlier_observations_are_not_written_to():
  environment = make()
  first = environment.reset()
  copy = first.observation['frame'].copy()
  play(environment, 5)
  np.testing.assert_array_equal(first.observation['frame'], copy)


def test_a_reset_in_mid_episode():
  environment = make()
  play(environment, 3)
  assert environment.reset().first()
  assert environment.step(0).mid()


@pytest.mark.parametrize('repeat', [1, 4, 7])
def test_action_repeat(repeat):
  environment = make(action_repeat=repeat, config=seconds(1))
  steps = [environment.reset()]
  while not steps[-1].last():
    steps.append(environment.step(8))
  assert len(steps) - 1 == -(-60 // repeat)
  assert sum(s.reward for s in steps[1:]) == 60 + 1000 * (len(steps) - 1)


@pytest.mark.parametrize('name', dmlab_actions.names())
def test_the_engine_reads_the_actions_that_are_meant(name):
  environment = make(action_set=name)
  environment.reset()
  rows = dmlab_actions.table(name)
  for action in range(environment.action_spec().num_values):
    environment.step(np.int32(action))
  assert lab().actions == [tuple(row.tolist()) for row in rows]
  for row in rows:
    assert (row.dtype, row.shape) == (np.intc, (7,))
    assert row.flags.c_contiguous
  bounds = [(spec['min'], spec['max']) for spec in lab().action_spec()]
  for row in lab().actions:
    assert all(low <= x <= high for x, (low, high) in zip(row, bounds, strict=True))


def test_action_sets():
  rows = {
    n: [r.tolist() for r in dmlab_actions.table(n)] for n in dmlab_actions.names()
  }
  assert {n: len(r) for n, r in rows.items()} == {
    'default': 9,
    'extended': 15,
    'extended_large': 17,
  }
  assert rows['default'] == [
    [0, 0, 0, 1, 0, 0, 0],  # Forward.
    [0, 0, 0, -1, 0, 0, 0],  # Backward.
    [0, 0, -1, 0, 0, 0, 0],  # Strafe left.
    [0, 0, 1, 0, 0, 0, 0],  # Strafe right.
    [-20, 0, 0, 0, 0, 0, 0],  # Look left.
    [20, 0, 0, 0, 0, 0, 0],  # Look right.
    [-20, 0, 0, 1, 0, 0, 0],  # Look left and forward.
    [20, 0, 0, 1, 0, 0, 0],  # Look right and forward.
    [0, 0, 0, 0, 1, 0, 0],  # Fire.
  ]
  for table in rows.values():
    assert len({tuple(r) for r in table}) == len(table)
  assert [r for r in rows['extended'] if r in rows['extended_large']] == (
    rows['extended']
  )


def test_the_fake_misreads_strided_arrays():
  """Else the test of what the engine reads could not fail."""
  make().reset()
  wide = np.arange(14, dtype=np.intc)
  lab().step(wide[::2], num_steps=1)
  assert lab().actions == [(0, 1, 2, 3, 4, 5, 6)]


@pytest.mark.parametrize('action', [-1, 9])
def test_actions_out_of_range(action):
  environment = make()
  environment.reset()
  with pytest.raises(ValueError, match=rf'action is {action}: must lie in \[0, 9\)'):
    environment.step(action)


def test_seeds():
  environment = make(seed=5, config=seconds(0.1))
  assert environment.episode_seed == -1
  play(environment, 30)
  seeds = lab().resets
  assert all(type(s) is int and 0 <= s < 2**31 for s in seeds)
  assert len(set(seeds)) == len(seeds) > 5
  assert environment.episode_seed == seeds[-1]
  again = make(seed=5, config=seconds(0.1))
  play(again, 30)
  assert lab().resets == seeds
  other = make(seed=6, config=seconds(0.1))
  play(other, 30)
  assert not set(lab().resets) & set(seeds)


def test_a_bounded_number_of_seeds():
  environment = make(episode_seeds=3, config=seconds(0.05))
  play(environment, 60)
  assert set(lab().resets) == {0, 1, 2}


def test_a_fresh_engine_with_the_same_history_repeats_itself():
  def trajectory(seed):
    environment = make(seed=seed, config=seconds(0.2))
    return [s.observation['frame'] for s in play(environment, 12, action=3)]

  first, second, other = trajectory(1), trajectory(1), trajectory(2)
  np.testing.assert_array_equal(first, second)
  assert (first[0] != other[0]).any()


def test_instructions_that_change_in_mid_episode():
  environment = make('language_select_located_object')
  steps = [environment.reset(), *play(environment, 29)]  # 116 of 120 frames.
  texts = [f'Pick the {colour} object' for colour in fake.COLOURS]
  ids = [instruction_ids.hash_instruction(t) for t in texts]
  for t, step in enumerate(steps):
    expected = ids[4 * t // fake.INSTRUCTION_FRAMES]
    np.testing.assert_array_equal(step.observation['instruction'], expected)
  last = environment.step(0)
  assert last.last()
  np.testing.assert_array_equal(last.observation['instruction'], ids[2])
  first = environment.step(0)
  np.testing.assert_array_equal(first.observation['instruction'], ids[0])


def test_text_is_hashed_once_for_each_change(monkeypatch):
  calls = []
  inner = instruction_ids.hash_instruction

  def hash_instruction(text):
    calls.append(text)
    return inner(text)

  monkeypatch.setattr(instruction_ids, 'hash_instruction', hash_instruction)
  environment = make('language_execute_random_task')
  play(environment, 30)
  assert len(calls) == 3


@pytest.mark.parametrize(
  'level', ['rooms_watermaze', 'seekavoid_arena_01', 'fake/no_instr']
)
def test_levels_without_instructions_have_zeros(level):
  environment = make(level)
  for step in play(environment, 3):
    assert not step.observation['instruction'].any()
    assert step.observation['instruction'].dtype == np.int32


def test_names_of_levels():
  for name in (
    'explore_object_rewards_few',
    'contributed/dmlab30/explore_object_rewards_few',
  ):
    assert make(name).level == 'contributed/dmlab30/explore_object_rewards_few'
  assert make('nav_maze_static_01').level == 'nav_maze_static_01'
  assert make('contributed/psychlab/harlow').level == 'contributed/psychlab/harlow'


def test_configuration_is_text_and_quiet(capfd):
  make(evaluation=True, dataset_path='dummy', config={'fps': '60'}).reset()
  assert lab()._config == {
    'width': '16',
    'height': '12',
    'logLevel': 'WARN',
    'allowHoldOutLevels': 'true',
    'mixerSeed': str(0x600D5EED),
    'datasetPath': 'dummy',
    'fps': '60',
  }
  make()
  assert lab()._config == {'width': '16', 'height': '12', 'logLevel': 'WARN'}
  assert capfd.readouterr().out == ''
  make(config={'logLevel': 'INFO'})
  assert capfd.readouterr().out != ''  # Else nothing could have been seen above.


def test_held_out_levels_are_for_evaluation():
  level = 'rooms_collect_good_objects_test'
  with pytest.raises(ValueError, match=f'{level}.*allowHoldOutLevels'):
    make(level)
  assert make(level, evaluation=True).reset().first()


def test_evaluation_has_other_episodes():
  frames = [
    make(seed=1, evaluation=e).reset().observation['frame'] for e in (False, True)
  ]
  assert (frames[0] != frames[1]).any()


@pytest.mark.parametrize(
  ('settings', 'words'),
  [
    ({'config': {'fps': 60}}, r"config\['fps'\] is 60: both must be str"),
    ({'action_set': 'ten'}, "action_set is 'ten': must be one of default, extended"),
    ({'action_repeat': 0}, 'action_repeat is 0: must be at least 1'),
    ({'episode_seeds': -1}, r'episode_seeds is -1: must lie in \[0, 2\^31\]'),
  ],
)
def test_impossible_settings(settings, words):
  with pytest.raises(ValueError, match=words):
    make(**settings)
  assert not fake.instances


@pytest.mark.parametrize(
  ('settings', 'words'),
  [
    ({'level': 'contributed/dmlab30/no_such'}, 'Failed to init environment'),
    ({'level': 'no_such'}, "'no_such': Failed to init environment"),
    ({'config': {'colour': 'red'}}, "apply setting 'colour = red'"),
    ({'config': {'fps': 'many'}}, "apply setting 'fps = many'"),
    ({'width': 30}, "apply setting 'width = 30'"),
    ({'renderer': 'paper'}, 'renderer'),
  ],
)
def test_what_the_engine_refuses(settings, words):
  """Mistakes of whoever calls: a process pool does not try them again."""
  with pytest.raises(ValueError, match=words):
    make(**settings)


def test_an_engine_that_does_not_start(monkeypatch):
  def construct(*_, **__):
    raise RuntimeError('Failed to connect RL API')

  monkeypatch.setattr(fake.Lab, '__init__', construct)
  with pytest.raises(RuntimeError, match="level 'lt_chasm': Failed to connect"):
    make('lt_chasm')


def test_pictures(tmp_path):
  assert make('psychlab_visual_search').reset().first()  # Needs none.
  level = 'psychlab_continuous_recognition'
  for missing in ('', str(tmp_path)):
    with pytest.raises(ValueError) as e:
      make(level, dataset_path=missing)
    for words in (level, repr(missing), 'Brady', 'brady_konkle_oliva2008', 'README'):
      assert words in str(e.value)
  (tmp_path / '0001.png').touch()
  assert make(level, dataset_path=str(tmp_path)).reset().first()
  assert make(level, dataset_path='dummy').reset().first()


@pytest.mark.parametrize('call', ['reset', 'step'])
def test_errors_of_the_engine_name_level_and_seed(call):
  environment = make(f'fake/error_at_{call}_2')
  play(environment, 2)
  with pytest.raises(RuntimeError) as e:
    environment.reset() if call == 'reset' else environment.step(0)
  assert f"level 'fake/error_at_{call}_2'" in str(e.value)
  assert f'episode seed {environment.episode_seed}: Failed to {call}' in str(e.value)
  assert environment.reset().first()  # The next episode, for whoever goes on.


def test_close_is_final_and_idempotent():
  environment = make()
  environment.reset()
  for _ in range(2):
    environment.close()
  for call in (environment.reset, lambda: environment.step(0)):
    with pytest.raises(RuntimeError, match='was closed'):
      call()
  assert environment.frame().shape == (12, 16, 3)


def test_close_in_a_process_that_would_crash(monkeypatch):
  """The real engine may segfault where it is used once closed."""
  monkeypatch.setenv('FAKE_DMLAB_SEGFAULT', '1')
  script = """
from impala_jax.environments.dmlab import environment as dmlab
environment = dmlab.make('lt_chasm', 0, level_cache_gib=0.0)
environment.reset()
environment.close()
environment.close()
{}
try:
  environment.step(0)
except RuntimeError:
  print('refused')
"""
  assert run(script.format('')) == (0, 'refused\n', '')
  lab = 'from tests import fake_deepmind_lab as f; f.instances[-1].observations()'
  code, _, _ = run(script.format(lab))
  assert code == -signal.SIGSEGV  # The fake does crash.


@pytest.mark.parametrize(
  ('fault', 'code', 'words'),
  [
    ('abort_at_step_2', -signal.SIGABRT, 'PANIC'),
    ('abort_at_reset_1', -signal.SIGABRT, 'PANIC'),
    ('exit_at_reset_1', 1, "Couldn't load"),
    ('segfault_at_step_1', -signal.SIGSEGV, ''),
  ],
)
def test_the_fake_ends_its_process_as_the_engine_does(fault, code, words):
  script = f"""
from impala_jax.environments.dmlab import environment as dmlab
environment = dmlab.make('fake/{fault}', 0, level_cache_gib=0.0)
for _ in range(5):
  environment.step(0)
"""
  ended, out, err = run(script)
  assert (ended, out) == (code, '')
  assert words in err


def test_temporary_folders_lie_in_tmpdir_and_go_with_close(tmp_path, monkeypatch):
  monkeypatch.setenv('TMPDIR', str(tmp_path))
  script = """
from impala_jax.environments.dmlab import environment as dmlab
import os
environment = dmlab.make('lt_chasm', 0, level_cache_gib=0.0)
print(len(os.listdir(os.environ['TMPDIR'])))
environment.close()
"""
  assert run(script)[:2] == (0, '1\n')
  assert not list(tmp_path.iterdir())


def test_level_cache(tmp_path):
  settings = {'level_cache': tmp_path, 'level_cache_gib': 1.0, 'episode_seeds': 2}
  environment = make('explore_goal_locations_small', **settings)
  play(environment, 100)
  assert len(fake.compiled) == 2
  stats = environment.level_cache.stats()
  assert (stats.misses, stats.writes, stats.corrupt) == (2, 2, 0)
  assert stats.hits == len(lab().resets) - 2
  # Another seed, another mixer: other maps.
  fresh = make('explore_goal_locations_small', evaluation=True, **settings)
  fresh.reset()
  assert len(fake.compiled) == 3


def test_a_broken_entry_is_compiled_anew(tmp_path):
  settings = {'level_cache': tmp_path, 'level_cache_gib': 1.0, 'episode_seeds': 1}
  make('fake/maps', **settings).reset()
  (entry,) = (tmp_path / 'maps').rglob('*.map')
  entry.write_bytes(entry.read_bytes()[:-10])
  environment = make('fake/maps', **settings)
  assert environment.reset().first()  # Else the fake would have ended this process.
  assert len(fake.compiled) == 2
  assert environment.level_cache.stats().corrupt == 1


def test_a_lying_cache_ends_the_process():
  """The fake is as unforgiving as the engine."""
  script = """
import deepmind_lab
class Cache:
  def fetch(self, key, path):
    return True
deepmind_lab.Lab('fake/maps', ['RGB'], level_cache=Cache()).reset(seed=1)
"""
  assert run(script)[0] == 1


def test_levels_without_maps_never_ask(tmp_path):
  environment = make('rooms_watermaze', level_cache=tmp_path, level_cache_gib=1.0)
  play(environment, 50)
  stats = environment.level_cache.stats()
  assert (stats.hits, stats.misses, stats.hit_rate) == (0, 0, None)


def test_without_the_engine(monkeypatch):
  monkeypatch.setitem(sys.modules, 'deepmind_lab', None)
  with pytest.raises(ImportError, match=r'docs/users/build\.md'):
    make()


def test_frame_is_the_last_one():
  environment = make()
  assert environment.frame() is None
  step = environment.reset()
  assert environment.frame() is step.observation['frame']
  assert isinstance(environment, dm_env.Environment)


def run(script):
  result = subprocess.run(
    [sys.executable, '-c', script],
    cwd=pathlib.Path(__file__).parents[3],
    env=dict(os.environ),
    capture_output=True,
    text=True,
    timeout=120,
  )
  return result.returncode, result.stdout, result.stderr
