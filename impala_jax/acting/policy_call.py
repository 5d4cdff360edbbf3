"""The batched policy call of actors, inference servers and evaluators.

Fixed shapes, each jitted once: those of `padded` rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from impala_jax import types
from impala_jax.agents import agent as agent_lib


@functools.lru_cache(maxsize=4)  # So that each evaluation of a run compiles nothing.
def make(choose: Callable[..., agent_lib.AgentStep]) -> Any:
  """One jitted policy call on the rows `ids` of all environments' states.

  Args:
    choose: `Agent.step` or `Agent.greedy_step`.

  Returns:
    (params, key, states, ids [B], timestep [B, ...], last_action [B]) ->
    (key, states, (action, log_prob, logits)). The states given are used up.
  """

  def act(
    params: types.Nest,
    key: jax.Array,
    states: types.Nest,
    ids: jax.Array,
    timestep: types.TimeStep,
    last_action: jax.Array,
  ) -> Any:
    key, sample_key = jax.random.split(key)
    state = jax.tree.map(lambda s: s[ids], states)
    out = choose(params, sample_key, timestep, last_action, state)
    states = jax.tree.map(lambda s, new: s.at[ids].set(new), states, out.state)
    return key, states, (out.action, out.log_prob, out.logits)

  return jax.jit(act, donate_argnums=2)


@jax.jit
def states_of(states: types.Nest, ids: jax.Array) -> types.Nest:
  """Rows `ids` [B] of all environments' states [N, ...], without the rest."""
  return jax.tree.map(lambda s: s[ids], states)


def padded(
  ids: np.ndarray, timestep: types.Nest, rows: int, spare: int
) -> tuple[np.ndarray, types.Nest]:
  """Ids and inputs of exactly `rows` rows; those added have the id `spare`.

  Args:
    ids: int32 [K], K at most `rows`.
    timestep: [K, ...], or any nest of such inputs.
    rows: of the policy call.
    spare: an id that no environment has, so that padding disturbs none.
  """
  missing = rows - len(ids)
  if not missing:
    return ids, timestep
  pad = lambda x: np.concatenate([x, np.repeat(x[:1], missing, 0)])
  return padded_ids(ids, rows, spare), jax.tree.map(pad, timestep)


def padded_ids(ids: np.ndarray, rows: int, spare: int) -> np.ndarray:
  """int32 [rows]: `ids` and then the id `spare`."""
  return np.concatenate([ids, np.full(rows - len(ids), spare, np.int32)])
