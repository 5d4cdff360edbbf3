"""Text instructions to ids of words, on the actor's side: text never travels.

As in the IMPALA paper, words are hashed into 1,000 buckets; `agents.instructions`
embeds them.
"""

import functools
import re

import numpy as np
import xxhash

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
