"""The suite of ViZDoom's scenarios, with its engines where they are installed."""

import importlib.util
import os
import pathlib
import signal
import time

import numpy as np
import pytest

from impala_jax import config as config_lib
from impala_jax.environments import registry, scoring, specs
from impala_jax.environments.doom import environment as doom
from impala_jax.environments.doom import suite as doom_suite

# What its engines have in shared memory bears no process's name: no two at once.
pytestmark = pytest.mark.xdist_group('doom')
SCENARIOS = doom_suite.SCENARIOS
needs_engine = pytest.mark.skipif(
  importlib.util.find_spec('vizdoom') is None, reason='needs vizdoom'
)


def make_config(*levels, envs=2, batch=0, **settings):
  return config_lib.Config(
    environment=config_lib.Environment(
      suite='doom', levels=levels or (doom_suite.GROUP,)
    ),
    actor=config_lib.Actor(envs_per_actor=envs, inference_batch=batch),
    suite_settings=doom_suite.Settings(**settings),
  )


@pytest.fixture
def opened():
  """Takes vectors; they are closed with the test."""
  vectors = []

  def keep(vector):
    vectors.append(vector)
    return vector

  yield keep
  for vector in vectors:
    vector.close()


def rounds(vector, enough, timeout=120.0):
  """Plays at random until `enough(all that was received)`; returns that."""
  rng = np.random.default_rng(0)
  deadline = time.monotonic() + timeout
  received = []
  while not enough(received):
    assert time.monotonic() < deadline
    ready = vector.recv(60.0)
    received.append(ready)
    vector.send(ready.env_ids, rng.integers(0, 9, len(ready.env_ids)))
  return received


def episodes(received):
  return [e for ready in received for e in ready.episodes]


class TestScores:
  def test_random_has_0_and_the_reference_100(self):
    random = {level: s.random for level, s in SCENARIOS.items()}
    reference = {level: s.reference for level, s in SCENARIOS.items()}
    assert doom_suite.scores(random) == {'mean_capped': 0.0, 'mean_uncapped': 0.0}
    assert doom_suite.scores(reference) == {
      'mean_capped': pytest.approx(100.0),
      'mean_uncapped': pytest.approx(100.0),
    }

  def test_by_hand(self):
    # 100 (5 + 211.89) / (101 + 211.89).
    assert doom_suite.reference('basic').score(5.0) == pytest.approx(69.318, abs=1e-3)
    assert doom_suite.reference('my_way_home').score(1.0) == pytest.approx(100.0)

  def test_a_level_counts_for_at_most_100_when_capped(self):
    returns = {level: s.random for level, s in SCENARIOS.items()}
    row = SCENARIOS['defend_the_line']
    returns['defend_the_line'] = row.random + 3 * (row.reference - row.random)
    found = doom_suite.scores(returns)
    assert found['mean_capped'] == pytest.approx(100 / 9)
    assert found['mean_uncapped'] == pytest.approx(300 / 9)

  def test_some_levels(self):
    found = doom_suite.scores({'my_way_home': 1.0, 'mine': 7.0})
    assert found == {'partial_mean_capped': 100.0, 'partial_levels': 1.0}
    assert doom_suite.scores({'mine': 7.0}) == {}
    assert doom_suite.reference('mine') is None

  def test_by_the_registry(self):
    returns = {level: s.random for level, s in SCENARIOS.items()}
    assert registry.scores(make_config(), returns)['mean_capped'] == 0.0
    assert registry.reference('doom', 'basic').full_is == 'reference'
    assert registry.reference('doom', 'mine') == scoring.Reference('mine')

  def test_references_are_far_from_random(self):
    for scenario in SCENARIOS.values():
      assert scenario.reference > scenario.random
      assert scenario.scale in (1.0, 0.01)


class TestConfiguration:
  @needs_engine
  def test_group(self):
    config = registry.resolve(make_config())
    assert config.environment.levels == tuple(SCENARIOS)
    assert len(SCENARIOS) == 9
    assert registry.resolve(config) == config

  @needs_engine
  def test_scenarios_come_with_the_engine(self):
    import vizdoom

    for level in SCENARIOS:
      assert pathlib.Path(vizdoom.scenarios_path, f'{level}.cfg').is_file()

  def test_not_installed(self, monkeypatch):
    real = importlib.util.find_spec
    missing = lambda name, *args: None if name == 'vizdoom' else real(name, *args)
    monkeypatch.setattr(importlib.util, 'find_spec', missing)
    with pytest.raises(config_lib.ConfigError, match="pip install 'vizdoom"):
      registry.resolve(make_config('basic'))
    # What needs no engine goes on.
    assert registry.environment_spec(make_config('basic')).num_actions == 9

  def test_the_pip_line_names_the_pinned_version(self):
    root = pathlib.Path(__file__).parents[3]
    for name in ('cluster', 'latest'):
      pins = (root / 'requirements' / f'{name}.txt').read_text().splitlines()
      (pin,) = [line for line in pins if line.startswith('vizdoom==')]
      assert pin in doom_suite.NOT_INSTALLED

  @pytest.mark.parametrize(
    ('level', 'text'),
    [
      ('defend_the_centre', 'did you mean defend_the_center'),
      ('xyz', 'did you mean basic, '),
      (doom_suite.GROUP, 'is a group of levels'),
    ],
  )
  def test_unknown_level(self, level, text):
    with pytest.raises(config_lib.ConfigError, match=text):
      registry.check(make_config(level))

  @pytest.mark.parametrize(
    ('settings', 'text'),
    [
      ({'action_set': 'all'}, "action_set is 'all'"),
      (
        {'frame_width': 1000},
        'doom.frame_width is 1000: with doom.frame_height 72 they must be at most 160',
      ),
    ],
  )
  def test_impossible_settings(self, settings, text):
    with pytest.raises(config_lib.ConfigError, match=text):
      registry.environment_spec(make_config('basic', **settings))

  @needs_engine
  def test_spec_is_that_of_the_environment(self):
    environment = doom.Doom('basic', 1)
    try:
      made = specs.environment_spec(environment)
    finally:
      environment.close()
    assert registry.environment_spec(make_config('basic')) == made


@needs_engine
class TestPlay:
  def test_all_levels(self, opened):
    config = registry.resolve(make_config(envs=9))
    vector = opened(registry.make_vector(config))
    assert vector.task_ids.tolist() == list(range(9))
    vector.reset(1)
    seen = set()

    def enough(received):
      seen.update(received[-1].env_ids.tolist() if received else ())
      return len(seen) == 9 and sum(len(r.env_ids) for r in received) > 90

    for ready in rounds(vector, enough):
      frames = ready.timestep.observation['frame']
      assert set(ready.timestep.observation) == {'frame'}
      assert frames.shape == (len(ready.env_ids), 72, 96, 3)
      assert frames.dtype == np.uint8
      assert np.all(frames.std(axis=(1, 2, 3)) > 2)

  def test_agents_see_scaled_rewards_and_figures_do_not(self, opened):
    config = make_config('health_gathering', 'my_way_home', max_episode_frames=40)
    vector = opened(registry.make_vector(config))
    vector.reset(1)
    both = lambda r: {e.task_id for e in episodes(r)} == {0, 1}
    received = rounds(vector, both)
    rewards = [
      float(ready.timestep.reward[row])
      for ready in received
      for row, i in enumerate(ready.env_ids)
      if i == 0 and ready.timestep.step_type[row]
    ]
    assert rewards == pytest.approx([0.04] * len(rewards))
    found = {e.task_id: e for e in episodes(received)}
    assert found[0].episode_return == pytest.approx(40.0)
    assert found[1].episode_return == pytest.approx(-0.004, abs=1e-4)
    assert all(e.length == 10 and e.truncated for e in found.values())

  def test_scenarios_without_a_limit_of_their_own_get_one(self, opened):
    config = make_config('take_cover', envs=1, action_repeat=700)
    vector = opened(registry.make_vector(config))
    vector.reset(1)
    (end, *_) = episodes(rounds(vector, lambda r: len(episodes(r)) >= 1))
    assert end.length <= 3

  def test_a_killed_engine_is_replaced(self, opened):
    config = make_config('basic', 'take_cover')
    vector = opened(registry.make_vector(config))
    vector.reset(1)
    rounds(vector, lambda r: {i for x in r for i in x.env_ids} == {0, 1})
    os.kill(vector.stats()['pids'][1], signal.SIGKILL)
    received = rounds(vector, lambda r: bool(r) and 1 in r[-1].restarted)
    (failure,) = [f for ready in received for f in ready.failures]
    assert failure.env_id == failure.task_id == 1
    assert 'doom level take_cover' in failure.cause
    assert 'SIGKILL' in failure.cause

  def test_an_engine_killed_while_it_starts_leaves_no_message_queues(self):
    shared = lambda: {p.name for p in pathlib.Path('/dev/shm').glob('ViZDoomMQ*')}
    before = shared()
    vector = registry.make_vector(make_config('basic', envs=1))
    try:
      for seed in range(4):
        vector.reset(seed)  # Kills what the one before started.
        deadline = time.monotonic() + 60.0
        while not self._maps_queues(vector.stats()['pids'][0]):
          assert time.monotonic() < deadline
          time.sleep(0.001)
    finally:
      vector.close()
    assert shared() <= before

  def _maps_queues(self, pid):
    try:
      return 'ViZDoomMQCtr' in pathlib.Path(f'/proc/{pid}/maps').read_text()
    except OSError:
      return False

  def test_scene(self, opened):
    config = make_config('basic', 'take_cover')
    scene = opened(registry.make_scene(config, 'take_cover'))
    assert scene.frame() is None
    scene.reset(1)
    rounds(scene, lambda r: len(r) >= 2)
    first = scene.frame()
    kept = first.copy()
    assert first.shape == (480, 640, 3)
    received = rounds(scene, lambda r: len(r) >= 5)
    assert set(received[-1].timestep.observation) == {'frame'}
    assert not np.array_equal(scene.frame(), kept)
    np.testing.assert_array_equal(first, kept)
    assert scene.task_ids.tolist() == [1]

  def test_the_same_seed_plays_the_same(self, opened):
    config = make_config('predict_position', envs=1)
    runs = []
    for seed in (3, 3, 4):
      vector = opened(registry.make_vector(config))
      vector.reset(seed)
      received = rounds(vector, lambda r: len(r) >= 12)
      runs.append([r.timestep.observation['frame'].tobytes() for r in received])
      vector.close()
    assert runs[0] == runs[1] != runs[2]

  def test_evaluation_is_not_limited_to_a_batch(self):
    config = make_config('basic', envs=3, batch=2)
    for evaluation, most in ((False, 2), (True, 3)):
      vector = registry.make_vector(config, evaluation=evaluation)
      try:
        assert vector._pool._limit == most
      finally:
        vector.close()


def test_settings_reach_the_engine():
  settings = doom_suite.Settings(
    action_repeat=2, frame_width=80, frame_height=60, max_episode_frames=100
  )
  made = doom_suite._engine(settings, 'take_cover', film=True)
  assert made.kwargs == {
    'level': 'take_cover',
    'action_set': 'default',
    'action_repeat': 2,
    'time_limit': 100,
    'width': 80,
    'height': 60,
    'reward_scale': 0.01,
    'picture': True,
  }
  assert doom_suite._engine(settings, 'basic', film=False).kwargs['time_limit'] == 100
