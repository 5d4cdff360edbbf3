"""A network on one device, with the recurrent states of many environments.

What an actor's own policy, an inference server and an evaluation have in common. States
stay on the device; policy calls have one of a few fixed numbers of rows, each compiled
once, and are padded to it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from impala_jax import config as config_lib
from impala_jax import types
from impala_jax.agents import agent as agent_lib


class Running(NamedTuple):
  """A policy call that the device may still be at, see `DevicePolicy.start`."""

  rows: int
  out: Any  # (action, log_prob, logits), padded, on the device.
  begun: int
  states: types.Nest  # Of the rows that begin, padded, on the device.
  version: int


class DevicePolicy:
  """Used by one thread, but for `set_parameters` and `version`.

  Args:
    agent: the network as pure functions.
    environments: how many states there are.
    sizes: rows of policy calls.
    device: that runs it; None for JAX's default.
    seed: of the sampling.
    greedy: take the likeliest action instead of sampling.
  """

  def __init__(
    self,
    agent: agent_lib.Agent,
    environments: int,
    sizes: Sequence[int],
    *,
    device: jax.Device | None = None,
    seed: int = 0,
    greedy: bool = False,
  ):
    self._agent = agent
    # One more row than environments: padding is read from and written to it.
    self._spare = environments
    self._sizes = sorted(sizes)
    self._device = device
    self._seed = seed
    self._act = _policy_call(agent.greedy_step if greedy else agent.step)
    self._reset = jax.jit(self._initial, donate_argnums=0)
    with jax.default_device(device):
      self._state = jax.device_put(agent.initial_state(environments + 1), device)
    self._key = self._first_key()
    self._params: tuple[int, types.Nest] = (-1, None)

  @property
  def version(self) -> int:
    """Learner updates behind the parameters in use; -1 where there are none yet."""
    return self._params[0]

  @property
  def largest(self) -> int:
    """Rows of the largest policy call."""
    return self._sizes[-1]

  def size(self, rows: int) -> int:
    """What so many rows are padded to."""
    return next(size for size in self._sizes if size >= rows)

  def set_parameters(self, version: int, params: types.Nest) -> None:
    """For all policy calls from now on. They are put on the device here, once."""
    self._params = (version, jax.device_put(params, self._device))

  def start(
    self,
    ids: np.ndarray,
    timestep: types.TimeStep,
    last_action: np.ndarray,
    begins: np.ndarray,
  ) -> Running:
    """One step for some environments; does not wait for the device.

    Args:
      ids: int32 [K], distinct, K at most `largest`.
      timestep: NumPy [K, ...], not written to any more.
      last_action: int32 [K].
      begins: bool [K], of which the state before this step is wanted.
    """
    begin_ids = ids[begins]
    states = None
    if len(begin_ids):
      states = _states_of(
        self._state, self._padded(begin_ids, self.size(len(begin_ids)))
      )
    version, params = self._params
    size = self.size(len(ids))
    if missing := size - len(ids):
      repeat = lambda x: np.concatenate([x, np.repeat(x[:1], missing, 0)])
      timestep, last_action = jax.tree.map(repeat, (timestep, last_action))
    rows = self._padded(ids, size)
    self._key, self._state, out = self._act(
      params, self._key, self._state, rows, timestep, last_action
    )
    return Running(len(ids), out, len(begin_ids), states, version)

  def finish(self, running: Running) -> tuple[list[np.ndarray], types.Nest]:
    """Waits for [action [K], log_prob [K], logits [K, A]] and states [F, ...]."""
    states = jax.tree.map(lambda x: np.asarray(x)[: running.begun], running.states)
    return [np.asarray(x)[: running.rows] for x in running.out], states

  def reset(self, ids: np.ndarray) -> None:
    """Gives environments int32 [K] their initial states."""
    for start in range(0, len(ids), self.largest):
      rows = self._padded(ids[start : start + self.largest], self.largest)
      self._state = self._reset(self._state, rows)

  def compile(self, spec: types.EnvironmentSpec) -> None:
    """Calls everything in every size, so that nothing is compiled afterwards."""
    is_leaf = lambda x: isinstance(x, types.ArraySpec)
    self.reset(np.full(1, self._spare, np.int32))
    for size in self._sizes:
      zeros = lambda s, size=size: np.zeros((size, *s.shape), s.dtype)
      timestep = types.TimeStep(
        np.zeros(size, np.uint8),
        np.zeros(size, np.float32),
        np.ones(size, np.float32),
        jax.tree.map(zeros, spec.observation, is_leaf=is_leaf),
      )
      ids = np.full(size, self._spare, np.int32)
      begins = np.ones(size, bool)
      self.finish(self.start(ids, timestep, np.zeros(size, np.int32), begins))
    # As if nothing had been drawn.
    self._key = self._first_key()

  def _first_key(self) -> jax.Array:
    return jax.device_put(jax.random.key(self._seed), self._device)

  def _padded(self, ids: np.ndarray, size: int) -> np.ndarray:
    """int32 [size]: `ids` and then the spare one, so that padding disturbs none."""
    return np.concatenate([ids, np.full(size - len(ids), self._spare, np.int32)])

  def _initial(self, states: types.Nest, rows: jax.Array) -> types.Nest:
    fresh = self._agent.initial_state(len(rows))
    return jax.tree.map(lambda s, x: s.at[rows].set(x), states, fresh)


@functools.lru_cache(maxsize=4)  # So that each evaluation of a run compiles nothing.
def _policy_call(choose: Callable[..., agent_lib.AgentStep]) -> Any:
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
def _states_of(states: types.Nest, ids: jax.Array) -> types.Nest:
  """Rows `ids` [B] of all environments' states [N, ...], without the rest."""
  return jax.tree.map(lambda s: s[ids], states)


def device_for(platform: str, index: int, field: str) -> jax.Device | None:
  """The device that a policy is to run on.

  Args:
    platform: 'auto' for JAX's default, or 'cpu', 'gpu' or 'tpu'.
    index: of the process; those of a host are dealt over its devices.
    field: what the setting is called, for the error.

  Returns:
    None for JAX's default.

  Raises:
    config.ConfigError: JAX finds no such device here.
  """
  if platform == 'auto':
    return None
  try:
    devices = jax.local_devices(backend=platform)
  except RuntimeError as e:
    found = sorted({d.platform for d in jax.local_devices()})
    raise config_lib.ConfigError(
      f'{field} is {platform!r}: JAX finds no such device on this machine, it has '
      f'{", ".join(found)} ({str(e).splitlines()[0]})'
    ) from None
  return devices[index % len(devices)]
