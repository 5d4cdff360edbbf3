"""The instruction encoder: ids of words to a vector, in the network.

As in the IMPALA paper: words are hashed into 1,000 buckets (by the environment, see
`environments.instruction_ids`), embedded in 20 dimensions, and the last output of an
LSTM of 64 units is the encoding.
"""

import flax.linen as nn
import jax.numpy as jnp

from impala_jax import types
from impala_jax.agents import lstm
from impala_jax.environments import instruction_ids


class InstructionEncoder(nn.Module):
  """Encodes the ids that `instruction_ids.hash_instruction` gives.

  Attributes:
    buckets: number of word ids, as given to `hash_instruction`.
    embedding: size of a word's embedding.
    units: size of the encoding.
  """

  buckets: int = instruction_ids.BUCKETS
  embedding: int = 20
  units: int = 64

  @nn.compact
  def __call__(self, ids: types.Array) -> types.Array:
    """int32 [N, L] -> float32 [N, units], zeros for an instruction without words.

    An id above `buckets` gives NaN: the environment's hash and the network differ.
    """
    if self.is_initializing():
      return self._encode(ids)
    # Most levels never say a word, and a scan of `L` small steps is a third of what
    # an actor's policy call costs.
    return nn.cond(
      jnp.any(ids != 0),
      lambda self, ids: self._encode(ids),
      lambda self, ids: jnp.zeros((ids.shape[0], self.units)),
      self,
      ids,
    )

  def _encode(self, ids: types.Array) -> types.Array:
    embedded = nn.Embed(self.buckets + 1, self.embedding, name='words')(ids)
    _, (h, _) = lstm.LSTM(self.units, name='lstm')(
      jnp.swapaxes(embedded, 0, 1),
      lstm.zero_state(ids.shape[0], self.units),
      skip=jnp.swapaxes(ids == 0, 0, 1),
    )
    return h
