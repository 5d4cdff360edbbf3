"""Text instructions: words to ids on the actor's side, ids to a vector in the network.

As in the IMPALA paper: words are hashed into 1,000 buckets, embedded in 20
dimensions, and the last output of an LSTM of 64 units is the encoding.
"""

import functools
import re

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import xxhash

from impala_jax import types
from impala_jax.agents import lstm

LENGTH = 16  # Words.
BUCKETS = 1000


@functools.lru_cache(maxsize=4096)
def hash_instruction(
  text: str, length: int = LENGTH, buckets: int = BUCKETS
) -> np.ndarray:
  """Ids of the words of `text`, the same in every process and on every machine.

  A word is a run of letters, digits and underscores; case does not matter.

  Args:
    text: the instruction; words after the first `length` are dropped.
    length: L.
    buckets: number of different ids; words may share one.

  Returns:
    int32 [L], read-only: ids in [1, buckets], then zeros where there is no word.

  Raises:
    ValueError: `length` or `buckets` is less than 1.
  """
  for name, value in (('length', length), ('buckets', buckets)):
    if value < 1:
      raise ValueError(f'{name} is {value}: must be at least 1')
  ids = np.zeros(length, np.int32)
  for i, word in enumerate(re.findall(r'\w+', text.lower())[:length]):
    ids[i] = xxhash.xxh3_64_intdigest(word.encode()) % buckets + 1
  ids.flags.writeable = False  # The cache hands the same array to everyone.
  return ids


class InstructionEncoder(nn.Module):
  """Encodes the ids that `hash_instruction` gives.

  Attributes:
    buckets: number of word ids, as given to `hash_instruction`.
    embedding: size of a word's embedding.
    units: size of the encoding.
  """

  buckets: int = BUCKETS
  embedding: int = 20
  units: int = 64

  @nn.compact
  def __call__(self, ids: types.Array) -> types.Array:
    """int32 [N, L] -> float32 [N, units], zeros for an instruction without words.

    An id above `buckets` gives NaN: the environment's hash and the network differ.
    """
    embedded = nn.Embed(self.buckets + 1, self.embedding, name='words')(ids)
    _, (h, _) = lstm.LSTM(self.units, name='lstm')(
      jnp.swapaxes(embedded, 0, 1),
      lstm.zero_state(ids.shape[0], self.units),
      skip=jnp.swapaxes(ids == 0, 0, 1),
    )
    return h
