"""AtariVector with a scripted engine for the rare cases, and its errors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impala_jax.environments.atari import environment as atari
from impala_jax.environments.atari import games as atari_games
from tests import counting

FIRST, MID, LAST = 0, 1, 2
_SMALL = (12, 10, 1)


class _ScriptedEngine:
  """In the place of ale-py's: autoreset in the next step, from drawn events.

  `script[i]` holds, for each step that environment i plays, (reward, event): 0 goes
  on, 1 loses a life, 2 is over, 3 reaches the time limit, 4 does so and loses a life.
  A game begins with 3 lives, and shows 0 before it is over.
  """

  def __init__(self, script):
    self._script = script
    self._next = [0] * len(script)
    self._over = [True] * len(script)
    self._lives = [3] * len(script)
    self.played = []  # (environment, action) of each step that was played.
    self.earned = [[0.0, 0, None] for _ in script]  # Return, length, truncated.
    self.finished = [[] for _ in script]

  def reset(self, seed):
    n = len(self._script)
    self._over = [True] * n
    rows = [self._step(i, 0) for i in range(n)]
    frames, _, _, _, info = self._pack(rows)
    return frames, info

  def send(self, actions):
    self._rows = [self._step(i, a) for i, a in enumerate(actions)]

  def recv(self):
    return self._pack(self._rows)

  def _step(self, i, action):
    if self._over[i]:
      self._over[i], self._lives[i] = False, 3
      self.earned[i] = [0.0, 0, None]
      return 0, False, False, 3
    self.played.append((i, int(action)))
    reward, event = self._script[i][self._next[i] % len(self._script[i])]
    self._next[i] += 1
    self._lives[i] = max(0, self._lives[i] - (event in (1, 4)))
    terminated = event == 2
    truncated = event in (3, 4)
    self.earned[i][0] += reward
    self.earned[i][1] += 1
    if terminated or truncated:
      self._over[i] = True
      self.earned[i][2] = truncated
      self.finished[i].append(tuple(self.earned[i]))
    return reward, terminated, truncated, self._lives[i]

  def _pack(self, rows):
    n = len(rows)
    frames = np.random.default_rng(0).integers(0, 256, (n, 1, *_SMALL[:2]), np.uint8)
    reward, terminated, truncated, lives = (
      np.array(x) for x in zip(*rows, strict=True)
    )
    info = {'env_id': np.arange(n, dtype=np.int32), 'lives': lives.astype(np.int32)}
    return frames, reward.astype(np.int32), terminated, truncated, info


_EVENTS = st.lists(
  st.tuples(st.integers(-2, 3), st.sampled_from([0, 0, 1, 2, 3, 4])),
  min_size=1,
  max_size=9,
)


def _scripted(monkeypatch, script, **kwargs):
  from ale_py import vector_env

  engine = _ScriptedEngine(script)
  monkeypatch.setattr(vector_env, 'AtariVectorEnv', lambda **_: engine)
  vector = atari.AtariVector('breakout', len(script), frame_shape=_SMALL, **kwargs)
  return vector, engine


@settings(max_examples=60, deadline=None)
@given(st.lists(_EVENTS, min_size=1, max_size=3), st.booleans())
def test_every_course_of_a_game_keeps_the_contract(script, episodic_life):
  with pytest.MonkeyPatch.context() as monkeypatch:
    vector, engine = _scripted(monkeypatch, script, episodic_life=episodic_life)
    ends = counting.check_vector_contract(vector, 40, cut_episodes=episodic_life)
    for i, finished in enumerate(engine.finished):
      found = [tuple(e[1:4]) for e in ends if e.env_id == i]
      # The engine may be one game ahead of what was delivered.
      assert found == finished[: len(found)]
      assert len(found) >= len(finished) - 1


def test_noop_after_a_lost_life_and_a_game_that_ends_in_it(monkeypatch):
  # Lost life; then over (terminated) in the NOOP; lost life; time limit in the NOOP.
  script = [[(1, 1), (2, 2), (4, 0), (8, 1), (16, 3), (0, 0)]]
  vector, engine = _scripted(monkeypatch, script, episodic_life=True)
  vector.reset(0)
  found, observations, ends = [], [], []
  for _ in range(9):
    ready = vector.recv(1.0)
    step = ready.timestep
    found.append((int(step.step_type[0]), float(step.reward[0]), step.discount[0]))
    observations.append(step.observation[0].copy())
    step.observation[:] = 0  # It belongs to the receiver.
    ends += [tuple(e[1:4]) for e in ready.episodes]
    vector.send(np.array([0]), np.array([3]))
  assert found == [
    (FIRST, 0, 1),  # A game begins.
    (LAST, 1, 0),  # A life is lost.
    (FIRST, 0, 1),  # In the NOOP the game ended.
    (LAST, 0, 0),
    (FIRST, 0, 1),  # The NOOP that begins the next game (reward 4 is not carried).
    (LAST, 8, 0),  # A life is lost.
    (FIRST, 0, 1),  # In the NOOP the time limit was reached.
    (LAST, 0, 1),
    (FIRST, 0, 1),
  ]
  assert ends == [(3.0, 2, False), (28.0, 3, True)]
  np.testing.assert_array_equal(observations[2], observations[3])
  np.testing.assert_array_equal(observations[6], observations[7])
  assert [a for _, a in engine.played] == [3, 0, 0, 3, 0, 0, 3]


def test_no_lives_left_is_not_yet_the_end(monkeypatch):
  script = [[(0, 1), (0, 0), (0, 1), (0, 0), (0, 1), (0, 0), (0, 2)]]
  vector, _ = _scripted(monkeypatch, script, episodic_life=True)
  vector.reset(0)
  found = []
  for _ in range(8):
    found.append(vector.recv(1.0).timestep.step_type[0])
    vector.send(np.array([0]), np.array([1]))
  # With lives 3, 2, 2, 1, 1, 0, 0, and then the end.
  assert found == [FIRST, LAST, FIRST, LAST, FIRST, MID, MID, LAST]


@pytest.mark.parametrize(
  ('game', 'text'),
  [
    ('brekout', "'brekout': did you mean breakout"),
    ('ALE/Pong-v5', 'did you mean pong'),
    ('joust', 'no mode for a single player'),
    ('', 'known are adventure, '),
  ],
)
def test_unknown_games(game, text):
  with pytest.raises(ValueError, match=text):
    atari.AtariVector(game, 1)


def test_known_games():
  names = atari_games.games()
  assert len(names) > 100
  assert {'breakout', 'pong', 'qbert'} <= set(names)
  assert all(atari_games.problem(n) is None for n in names)


@pytest.mark.parametrize(
  'bad',
  [
    {'num_envs': 0},
    {'frame_shape': (84, 84, 4)},
    {'action_repeat': 0},
    {'noop_max': -1},
    {'sticky_actions': 1.5},
    {'max_episode_frames': 3},
    {'env_threads': -1},
    {'inference_batch': 3},
  ],
)
def test_bad_settings(bad):
  name = next(iter(bad))
  with pytest.raises(ValueError, match=f'^{name} is '):
    atari.AtariVector('breakout', **({'num_envs': 2} | bad))


def test_misuse_is_refused_and_leaves_no_trace():
  vector = atari.AtariVector('breakout', 2, frame_shape=_SMALL)
  vector.reset(0)
  ids, zeros = np.arange(2), np.zeros(2, np.int32)
  with pytest.raises(ValueError, match='wait for an action'):
    vector.send(ids, zeros)
  vector.recv(1.0)
  for bad_ids, actions, text in [
    (ids, zeros + 4, r'must lie in \[0, 4\)'),
    (ids, zeros - 1, r'must lie in \[0, 4\)'),
    (ids, zeros.astype(np.float32), 'int32'),
    (ids, zeros[:1], 'one for each'),
    (ids * 0, zeros, 'distinct'),
    (ids + 1, zeros, 'distinct'),
    (ids - 1, zeros, 'distinct'),
  ]:
    with pytest.raises(ValueError, match=text):
      vector.send(bad_ids, actions)
  vector.send(ids[1:], zeros[1:])
  with pytest.raises(TimeoutError, match='1 environments wait'):
    vector.recv(0.01)
  vector.send(ids[:1], zeros[:1])
  assert vector.recv(1.0).env_ids.tolist() == [0, 1]
  vector.close()
  for call in (lambda: vector.recv(1.0), lambda: vector.reset(0)):
    with pytest.raises(RuntimeError, match='closed'):
      call()
