"""Hashing of words and their encoding."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impala_jax.agents import instructions
from impala_jax.environments import instruction_ids


def test_ids_are_fixed_for_ever():
  # xxh3-64 of the word, modulo 1000, plus 1. A change would silently spoil every
  # stored checkpoint.
  ids = instruction_ids.hash_instruction('Pick the RED ball, pick the ball!', length=8)
  np.testing.assert_array_equal(ids, [863, 814, 102, 300, 863, 814, 300, 0])
  assert ids.dtype == np.int32


def test_ids_do_not_depend_on_the_process():
  code = (
    'from impala_jax.environments import instruction_ids as i;'
    "print(i.hash_instruction('go to the green door').tolist())"
  )
  out = subprocess.run(
    [sys.executable, '-c', code],
    env={'PYTHONHASHSEED': '7', 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': '.'},
    capture_output=True,
    text=True,
    timeout=60,
    check=True,
  ).stdout
  here = instruction_ids.hash_instruction('go to the green door')
  assert out.strip() == str(here.tolist())


@given(st.text(), st.integers(1, 20), st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_ids_of_any_text(text, length, buckets):
  ids = instruction_ids.hash_instruction(text, length, buckets)
  assert ids.shape == (length,)
  words = np.count_nonzero(ids)
  assert (ids[:words] >= 1).all()
  assert (ids[:words] <= buckets).all()
  np.testing.assert_array_equal(ids[words:], 0)
  assert not ids.flags.writeable


def test_long_and_empty_texts():
  long = instruction_ids.hash_instruction('a b c d e', length=3)
  np.testing.assert_array_equal(
    long, instruction_ids.hash_instruction('a b c', length=3)
  )
  np.testing.assert_array_equal(instruction_ids.hash_instruction(' \n'), np.zeros(16))


@pytest.mark.parametrize('field', ['length', 'buckets'])
def test_impossible_sizes(field):
  with pytest.raises(ValueError, match=f'{field} is 0: must be at least 1'):
    instruction_ids.hash_instruction('word', **{field: 0})


@pytest.fixture(scope='module')
def encoder():
  module = instructions.InstructionEncoder()
  variables = module.init(jax.random.key(0), np.zeros((1, 16), np.int32))
  return lambda ids: np.asarray(module.apply(variables, ids))


def test_padding_does_not_matter_and_order_does(encoder):
  encode = lambda text, n: encoder(instruction_ids.hash_instruction(text, n)[None])[0]
  short = encode('red ball', 2)
  assert short.shape == (64,)
  assert np.abs(short).max() > 0
  np.testing.assert_allclose(encode('red ball', 16), short, atol=1e-6)
  assert np.abs(encode('ball red', 16) - short).max() > 1e-3
  assert np.abs(encode('red', 16) - short).max() > 1e-3


def test_no_words_give_zeros(encoder):
  ids = np.stack([np.zeros(16, np.int32), instruction_ids.hash_instruction('jump')])
  encoded = encoder(ids)
  np.testing.assert_array_equal(encoded[0], 0)
  assert np.abs(encoded[1]).max() > 0


def test_an_id_beyond_the_buckets_shows(encoder):
  assert np.isnan(encoder(np.full((1, 16), 1001, np.int32))).all()
  assert np.isfinite(encoder(np.full((1, 16), 1000, np.int32))).all()
