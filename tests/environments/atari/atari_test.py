"""AtariVector against plain ALE, played by the rules one frame at a time."""

import ale_py
import numpy as np
import pytest
from ale_py import roms

from impala_jax.environments.atari import environment as atari
from impala_jax.environments.atari import games as atari_games
from impala_jax.environments.atari import video as atari_video
from tests import counting

FIRST, MID, LAST = 0, 1, 2
_SMALL = (12, 10, 1)


def _plain(game, actions, episodic_life, max_episode_frames=108_000):
  """What the agent should see: from the rules, one frame of plain ALE at a time.

  Yields (step type, reward, discount, grey screen or None, finished (return, length,
  truncated) or None).
  """
  ale = ale_py.ALEInterface()
  ale.setFloat('repeat_action_probability', 0.0)
  ale.loadROM(roms.get_rom_path(game))
  buttons = ale.getMinimalActionSet()
  before = 'over'
  for action in actions:
    if before == 'over':
      ale.reset_game()
      total = length = frames = 0
      lives = ale.lives()
      before = 'playing'
      yield FIRST, 0.0, 1.0, ale.getScreenGrayscale(), None
      continue
    revived = before == 'lost a life'
    reward = 0.0
    screens = []
    for _ in range(4):
      reward += ale.act(buttons[0 if revived else action])
      screens.append(ale.getScreenGrayscale())
      frames += 1
      if ale.game_over() or frames >= max_episode_frames:
        break
    total += reward
    length += 1
    dropped, lives = ale.lives() < lives, ale.lives()
    screen = np.maximum(screens[-1], screens[-2]) if len(screens) == 4 else None
    if ale.game_over() or frames >= max_episode_frames:
      assert not revived, 'the scripted engine is for that'
      before = 'over'
      end = total, length, not ale.game_over()
      yield LAST, reward, float(not ale.game_over()), None, end
    elif revived:
      before = 'playing'
      yield FIRST, 0.0, 1.0, screen, None
    elif episodic_life and dropped:
      before = 'lost a life'
      yield LAST, reward, 0.0, screen, None
    else:
      yield MID, reward, 1.0, screen, None


@pytest.mark.parametrize(
  ('game', 'episodic_life', 'limit', 'games_over'),
  [
    ('breakout', True, 108_000, 2),
    ('breakout', False, 108_000, 2),
    ('breakout', False, 120, 20),
    ('ms_pacman', True, 108_000, 1),
  ],
)
def test_equals_plain_ale(game, episodic_life, limit, games_over):
  steps = 700
  vector = atari.AtariVector(
    game,
    1,
    noop_max=0,
    episodic_life=episodic_life,
    max_episode_frames=limit,
    frame_shape=(210, 160, 1),
  )
  actions = np.random.default_rng(3).integers(0, vector.spec.num_actions, steps)
  vector.reset(0)
  ends, cuts = [], 0
  # The action before a time step leads to it; the first is led to by none.
  for t, expected in enumerate(_plain(game, actions, episodic_life, limit)):
    if t:
      vector.send(np.array([0]), actions[t : t + 1])
    ready = vector.recv(10.0)
    seen = ready.timestep
    step_type, reward, discount, screen, end = expected
    found = seen.step_type[0], seen.reward[0], seen.discount[0]
    assert found == (step_type, reward, discount), f'step {t}'
    if screen is not None:
      np.testing.assert_array_equal(seen.observation[0, ..., 0], screen, f'step {t}')
    assert [tuple(e[1:4]) for e in ready.episodes] == ([end] if end else [])
    ends += ready.episodes
    cuts += step_type == LAST and end is None
  assert len(ends) >= games_over
  assert (cuts > 0) == episodic_life
  vector.close()


def test_time_limit_in_the_noop_of_a_real_game():
  def play(limit):
    vector = atari.AtariVector(
      'breakout', 1, noop_max=0, episodic_life=True, max_episode_frames=limit
    )
    vector.reset(0)
    steps = []
    for t in range(120):
      ready = vector.recv(10.0)
      steps.append((ready.timestep.step_type[0], ready.timestep.discount[0]))
      if ready.episodes:
        return steps, ready.episodes[0]
      vector.send(np.array([0]), np.array([t % 4]))
    return steps, None

  steps, _ = play(108_000)
  lost = steps.index((LAST, 0.0))
  steps, end = play(4 * (lost + 1))
  assert steps[lost:] == [(LAST, 0.0), (FIRST, 1.0), (LAST, 1.0)]
  assert (end.length, end.truncated) == (lost + 1, True)


@pytest.mark.parametrize('batch', [0, 2])
def test_contract(batch):
  vector = atari.AtariVector(
    'pong', 3, episodic_life=True, inference_batch=batch, max_episode_frames=200
  )
  ends = counting.check_vector_contract(vector, 120)
  assert {e.length for e in ends} == {50}
  assert all(e.truncated for e in ends)
  counting.check_vector_contract(vector, 30, seed=1)  # Reset in mid-play.
  vector.close()
  vector.close()


def _trajectory(vector, seed, steps):
  rng = np.random.default_rng(0)
  actions = rng.integers(0, vector.spec.num_actions, (steps, vector.num_envs))
  count = np.zeros(vector.num_envs, int)
  found = [[] for _ in range(vector.num_envs)]
  vector.reset(seed)
  while count.min() < steps:
    ready = vector.recv(10.0)
    ids = ready.env_ids
    for k, i in enumerate(ids):
      found[i].append([x[k] for x in ready.timestep])
    vector.send(ids, actions[np.minimum(count[ids], steps - 1), ids])
    count[ids] += 1
  return [[np.stack(x) for x in zip(*f[:steps], strict=True)] for f in found]


def _same(a, b):
  pairs = (p for x, y in zip(a, b, strict=True) for p in zip(x, y, strict=True))
  return all(np.array_equal(x, y) for x, y in pairs)


def test_seed_decides_everything():
  make = lambda **kw: atari.AtariVector('breakout', 3, sticky_actions=0.25, **kw)
  vector = make()
  first = _trajectory(vector, 5, 80)
  assert _same(first, _trajectory(vector, 5, 80))
  assert _same(first, _trajectory(make(), 5, 80))
  assert _same(first, _trajectory(make(inference_batch=2, env_threads=2), 5, 80))
  steady = atari.AtariVector('breakout', 3, sticky_actions=0.0)
  assert not _same(first, _trajectory(steady, 5, 80))
  other = _trajectory(vector, 6, 80)
  assert not _same(first, other)
  assert not _same(first[:1], first[1:2])


def test_random_start_has_at_most_noop_max_frames():
  def starts(noop_max):
    vector = atari.AtariVector('pong', 8, noop_max=noop_max)
    vector.reset(2)
    return {x.tobytes() for x in vector.recv(10.0).timestep.observation}

  # Pong's picture changes in its first frame.
  assert len(starts(0)) == 1
  assert len(starts(1)) == 2


def test_fire_is_pressed_only_where_asked():
  def lives_lost(fire_on_reset):
    vector = atari.AtariVector(
      'breakout', 1, fire_on_reset=fire_on_reset, noop_max=10, episodic_life=True
    )
    vector.reset(0)
    lost = 0
    for _ in range(150):
      lost += vector.recv(10.0).timestep.step_type[0] == LAST
      vector.send(np.array([0]), np.array([0]))
    return lost

  # Breakout serves a ball at FIRE alone: never to an agent that does nothing, but
  # once where the game begins with it.
  assert lives_lost(False) == 0
  assert lives_lost(True) == 1


def test_video_is_of_the_game_that_is_played():
  film = atari_video.AtariVideo('breakout', sticky_actions=0.25, task_id=2)
  plain = atari.AtariVector('breakout', 1, sticky_actions=0.25)
  seen = []
  for vector in (film, plain):
    rng = np.random.default_rng(1)
    vector.reset(4)
    steps = []
    for _ in range(300):
      ready = vector.recv(10.0)
      steps.append((ready.timestep.reward[0], ready.timestep.observation.sum()))
      if vector is film:
        assert (film.frame().shape, film.frame().dtype) == ((210, 160, 3), np.uint8)
      vector.send(ready.env_ids, rng.integers(0, 4, 1))
    seen.append(steps)
  assert seen[0] == seen[1]
  assert sum(r for r, _ in seen[0]) > 0
  assert film.frame().std() > 0
  assert film.task_ids.tolist() == [2]
  film.close()


def test_all_actions_are_playable_where_the_engine_takes_half_of_them():
  vector = atari.AtariVector('skiing', 1, full_action_space=True, frame_shape=_SMALL)
  assert vector.spec.num_actions == 18
  vector.reset(0)
  for action in range(18):
    vector.recv(10.0)
    vector.send(np.array([0]), np.array([action]))
  vector.recv(10.0)
  table, noop = atari_games.native_actions('skiing', True)
  assert noop == 0
  assert table[:2].tolist() == [0, 0]
  np.testing.assert_array_equal(table[2:10], table[10:18])
  np.testing.assert_array_equal(
    atari_games.native_actions('breakout', True)[0], np.arange(18)
  )
