"""The Procgen adapter over an engine that counts."""

import sys
import types as python_types

import numpy as np
import pytest

from impala_jax import config as config_lib
from impala_jax import types
from impala_jax.environments import procgen, registry

FIRST, MID, LAST = types.StepType.FIRST, types.StepType.MID, types.StepType.LAST


class _Engine:
  """Environment i ends each episode with its (i + 2)th step; rewards are 1.

  The frame holds the number of steps so far, of the environment in all.
  """

  def __init__(self, **settings):
    self.settings = settings
    self.count = settings['num']
    self.steps = np.zeros(self.count, int)
    self.episode_steps = np.zeros(self.count, int)
    self.begins = np.ones(self.count, bool)
    self.actions = []
    self.frames = np.zeros((self.count, 64, 64, 3), np.uint8)
    self.closed = False

  def act(self, actions):
    assert actions.dtype == np.int32
    self.actions.append(actions.tolist())
    self.steps += 1
    self.episode_steps += 1
    self.begins = self.episode_steps == np.arange(self.count) + 2
    self.episode_steps[self.begins] = 0

  def observe(self):
    self.frames[:] = self.steps[:, None, None, None]
    return np.ones(self.count, np.float32), {'rgb': self.frames}, self.begins

  def close(self):
    self.closed = True


@pytest.fixture
def engines(monkeypatch):
  """Those that were made."""
  made = []
  module = python_types.ModuleType('procgen')
  module.env = python_types.SimpleNamespace(
    ProcgenGym3Env=lambda **settings: made.append(_Engine(**settings)) or made[-1]
  )
  monkeypatch.setitem(sys.modules, 'procgen', module)
  return made


def _play(vector, steps):
  found = []
  for _ in range(steps):
    found.append(vector.recv(1.0))
    ids = found[-1].env_ids
    vector.send(ids, np.full(len(ids), 7, np.int32))
  return found


def test_episodes_and_what_they_are_made_of(engines):
  vector = procgen.ProcgenVector('coinrun', 2, task_id=3)
  vector.reset(5)
  ready = _play(vector, 7)
  of = lambda i, part: [getattr(r.timestep, part)[i] for r in ready]
  frame = lambda i: [int(r.timestep.observation[i, 0, 0, 0]) for r in ready]
  # The first environment: the step that ends an episode, then an ignored action.
  assert of(0, 'step_type') == [FIRST, MID, LAST, FIRST, LAST, FIRST, LAST]
  assert frame(0) == [0, 1, 1, 3, 3, 5, 5]
  assert of(0, 'reward') == [0, 1, 1, 0, 1, 0, 1]
  assert of(0, 'discount') == [1, 1, 0, 1, 0, 1, 0]
  assert of(1, 'step_type') == [FIRST, MID, MID, LAST, FIRST, MID, LAST]
  assert frame(1) == [0, 1, 2, 2, 4, 5, 5]
  ends = [(e.env_id, e.episode_return, e.length) for r in ready for e in r.episodes]
  # The reward of the step with the ignored action counts, too.
  assert ends == [(0, 2, 2), (1, 3, 3), (0, 2, 1), (0, 2, 1), (1, 3, 2)]
  assert {e.task_id for r in ready for e in r.episodes} == {3}
  assert engines[0].actions[2:4] == [[4, 7], [7, 4]]
  assert [r.timestep.observation.dtype for r in ready] == [np.uint8] * 7


def test_what_was_delivered_is_not_written_to_again(engines):
  vector = procgen.ProcgenVector('coinrun', 1)
  vector.reset(0)
  (first, _) = _play(vector, 2)
  assert not first.timestep.observation.any()


def test_an_episode_that_ends_with_the_ignored_action_is_left_out(engines):
  vector = procgen.ProcgenVector('coinrun', 1)
  vector.reset(0)
  ready = _play(vector, 3)
  engines[0].episode_steps[:] = 1
  ready += _play(vector, 2)
  assert [int(r.timestep.step_type[0]) for r in ready] == [FIRST, MID, LAST, FIRST, MID]
  assert [e.episode_return for r in ready for e in r.episodes] == [2]
  assert vector.recv(0).episodes[0].episode_return == 2


@pytest.mark.parametrize(
  ('level', 'game', 'mode'),
  [('maze', 'maze', 'hard'), ('maze_easy', 'maze', 'easy')],
)
def test_levels(engines, level, game, mode):
  vector = procgen.ProcgenVector(level, 2, threads=2)
  vector.reset(9)
  settings = engines[0].settings
  assert (settings['env_name'], settings['distribution_mode']) == (game, mode)
  assert (settings['rand_seed'], settings['num_threads']) == (9, 2)
  vector.reset(10)
  assert engines[0].closed
  vector.close()
  vector.close()
  assert engines[1].closed


def test_wrong_use(engines):
  vector = procgen.ProcgenVector('coinrun', 2)
  vector.reset(0)
  vector.recv(1.0)
  with pytest.raises(TimeoutError, match=r'\[0, 1\] wait'):
    vector.recv(1.0)
  with pytest.raises(ValueError, match='15'):
    vector.send(np.array([0]), np.array([15]))
  vector.send(np.array([0]), np.array([1]))
  with pytest.raises(ValueError, match='env_ids'):
    vector.send(np.array([0]), np.array([1]))
  with pytest.raises(TimeoutError, match=r'\[1\] wait'):
    vector.recv(1.0)


def _config(*levels):
  return config_lib.override(
    config_lib.Config(),
    ['environment.suite=procgen', f'environment.levels={",".join(levels)}'],
  )


def test_the_suite(engines):
  config = _config('coinrun', 'maze_easy')
  assert registry.environment_spec(config) == procgen.SPEC
  vector = registry.make_vector(config, num_envs=5)
  vector.reset(1)
  assert sorted(e.settings['num'] for e in engines) == [2, 3]
  assert sorted(vector.task_ids.tolist()) == [0, 0, 0, 1, 1]
  with pytest.raises(config_lib.ConfigError, match=r"'coinrum'.*coinrun"):
    registry.check(_config('coinrum'))


def test_without_the_engine_it_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(config_lib.ConfigError, match=r'pip install .*procgen-mirror'):
    registry.resolve(_config('coinrun'))


def test_the_engine_itself():
  pytest.importorskip('procgen')
  vector = procgen.ProcgenVector('coinrun_easy', 4)
  vector.reset(3)
  rng = np.random.default_rng(0)
  lengths = []
  for _ in range(1200):
    ready = vector.recv(1.0)
    lengths += [e.length for e in ready.episodes]
    vector.send(ready.env_ids, rng.integers(0, 15, 4).astype(np.int32))
  assert lengths
  assert max(lengths) <= 1000
