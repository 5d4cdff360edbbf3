import dm_env
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impala_jax.environments import catch, vector
from tests import counting


def _follow(board):
  """The action of a perfect player who sees only the board."""
  ball = board[:-1].any(axis=0).argmax()
  paddle = board[-1].argmax()
  return int(np.sign(ball - paddle)) + 1


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 9), st.integers(0, 2**31 - 1))
def test_one_game(rows, columns, seed):
  game = catch.Catch(rows, columns, seed)
  rng = np.random.default_rng(seed)
  step = game.reset()
  assert step.first()
  column = step.observation[0].argmax()
  paddle = columns // 2
  for t in range(1, rows):
    action = int(rng.integers(3))
    paddle = min(max(paddle + action - 1, 0), columns - 1)
    step = game.step(action)
    expected = np.zeros((rows, columns), np.float32)
    expected[t, column] = 1
    expected[rows - 1, paddle] = 1
    game.observation_spec().validate(step.observation)
    np.testing.assert_array_equal(step.observation, expected)
    assert step.last() == (t == rows - 1)
    if not step.last():
      assert (step.reward, step.discount) == (0, 1)
  assert (step.reward, step.discount) == (1.0 if column == paddle else -1.0, 0)
  assert game.step(0).first()


def test_contract_and_perfect_play():
  games = vector.SequentialVector([lambda seed: catch.Catch(seed=seed)] * 8)
  ends = counting.check_vector_contract(games, 400)
  assert {e.length for e in ends} == {9}
  # Of 8 * 40 random games about a fifth is won: standard deviation 0.045.
  assert abs(np.mean([e.episode_return for e in ends]) + 0.6) < 0.2
  games.reset(1)
  won = []
  while len(won) < 80:
    ready = games.recv(1.0)
    won += [e.episode_return for e in ready.episodes]
    actions = [_follow(b) for b in ready.timestep.observation]
    games.send(ready.env_ids, np.array(actions, np.int32))
  assert set(won) == {1.0}


def test_picture():
  game = catch.Catch(3, 4, seed=0)
  step = game.reset()
  frame = game.frame()
  assert (frame.shape, frame.dtype) == ((48, 64, 3), np.uint8)
  for channel in range(3):
    np.testing.assert_array_equal(frame[8::16, 8::16, channel], 255 * step.observation)


def test_errors():
  for rows, columns in ((1, 5), (5, 0)):
    with pytest.raises(ValueError, match='rows, columns are'):
      catch.Catch(rows, columns)
  game = catch.Catch()
  game.reset()
  with pytest.raises(ValueError, match='action is 3'):
    game.step(3)
  assert isinstance(game, dm_env.Environment)
