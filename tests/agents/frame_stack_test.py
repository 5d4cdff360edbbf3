"""Frame stacks against ones built frame by frame."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from impala_jax import types
from impala_jax.agents import frame_stack

_stack = jax.jit(frame_stack.stack, static_argnums=3)


def _slow_stack(frames, first, state, k):
  t, b, _, _, c = frames.shape
  stacks = np.zeros((*frames.shape[:-1], c * k), frames.dtype)
  last = np.zeros_like(state)
  for j in range(b):
    history = [state[j, ..., i * c : (i + 1) * c] for i in range(k - 1)]
    for i in range(t):
      if first[i, j]:
        history = [np.zeros_like(frames[i, j])] * (k - 1)
      history = [*history, frames[i, j]]
      stacks[i, j] = np.concatenate(history, axis=-1)
      history = history[1:]
    last[j] = np.concatenate(history, axis=-1)
  return stacks, last


@st.composite
def _cases(draw):
  # Few shapes: each is compiled once.
  t, b = draw(st.sampled_from((1, 2, 6))), 3
  k, c = draw(st.sampled_from(((2, 3), (4, 1))))
  flags = draw(st.lists(st.booleans(), min_size=t * b, max_size=t * b))
  rng = np.random.default_rng(draw(st.integers(0, 1000)))
  frames = rng.integers(1, 256, (t, b, 2, 3, c), np.uint8)
  state = rng.integers(0, 256, (b, 2, 3, c * (k - 1)), np.uint8)
  return frames, np.array(flags).reshape(t, b), state, k


@given(_cases())
@settings(max_examples=60, deadline=None)
def test_equals_the_slow_stack(case):
  got, got_state = _stack(*case)
  want, want_state = _slow_stack(*case)
  assert got.dtype == np.uint8
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(got_state, want_state)


def test_initial_state_is_of_the_frames_form():
  state = frame_stack.initial(3, types.ArraySpec((4, 5, 2), np.dtype(np.uint8)), 4)
  assert state.shape == (3, 4, 5, 6)
  assert state.dtype == np.uint8
  np.testing.assert_array_equal(state, 0)
