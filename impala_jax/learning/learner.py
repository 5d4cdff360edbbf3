"""The learner's update: unrolls in, one optimiser step out, over all devices.

`make_update` is the pure function `(state, rows) -> (state, params, metrics)`;
`Learner` runs it under `jax.pmap` with the state donated. Losses are sums, so
gradients are summed over devices: the update does not depend on how many devices
share the batch, nor on how many processes those are in.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from impala_jax import losses, types, unroll_layout
from impala_jax.agents import agent as agent_lib

_AXIS = 'devices'


class LearnerState(NamedTuple):
  """Everything that a resumed run needs, on each device alike."""

  params: types.Nest
  opt_state: Any
  updates: jax.Array  # int32 [], batches consumed, skipped ones included.
  skipped: jax.Array  # int32 [], batches refused, see `make_update`.


def time_major(unroll: types.Unroll) -> types.Unroll:
  """[B, T, ...] leaves to [T, B, ...]; `[B]` and state leaves stay."""

  def swap(tree: types.Nest) -> types.Nest:
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)

  return unroll._replace(
    timestep=swap(unroll.timestep),
    action=swap(unroll.action),
    behaviour_log_prob=swap(unroll.behaviour_log_prob),
    behaviour_logits=swap(unroll.behaviour_logits),
  )


def last_actions(unroll: types.Unroll) -> jax.Array:
  """int32 [T + 1, B] of a time-major unroll: the action that led to each step."""
  return jnp.concatenate([unroll.last_action[None], unroll.action])


def init_state(
  agent: agent_lib.Agent, optimizer: optax.GradientTransformation, key: jax.Array
) -> LearnerState:
  params = agent.init(key)
  zero = jnp.zeros((), jnp.int32)
  return LearnerState(params, optimizer.init(params), zero, zero)


def objective(
  agent: agent_lib.Agent, loss_fn: losses.LossFn
) -> Callable[[types.Nest, types.Unroll], tuple[jax.Array, losses.Metrics]]:
  """`(params, time-major unroll) -> (loss f32[], metrics)`: what is minimised."""

  def loss_of(
    params: types.Nest, unroll: types.Unroll
  ) -> tuple[jax.Array, losses.Metrics]:
    output, _ = agent.unroll(
      params, unroll.timestep, last_actions(unroll), unroll.agent_state
    )
    return loss_fn(output, unroll)

  return loss_of


def make_update(
  agent: agent_lib.Agent,
  loss_fn: losses.LossFn,
  optimizer: optax.GradientTransformation,
  layout: unroll_layout.UnrollLayout,
  axis_name: str | None = None,
) -> Callable[
  [LearnerState, jax.Array], tuple[LearnerState, types.Nest, losses.Metrics]
]:
  """Builds the pure update.

  Returns:
    `(state, rows uint8 [B, nbytes]) -> (state, params, metrics)`. `params` are
    the new parameters in buffers of their own, so that they can be published
    while the next update donates the state. Where loss, gradient, new parameters or
    the optimiser's new state are not finite, parameters and optimiser stay as they
    were, `skipped` grows, and the metric `culprit` is an index of `suspects` above 0.
    Metrics named `*_loss` or `*_steps` are sums over the whole batch, others means
    over devices.
  """
  loss_of = objective(agent, loss_fn)

  def update(
    state: LearnerState, rows: jax.Array
  ) -> tuple[LearnerState, types.Nest, losses.Metrics]:
    unroll = time_major(layout.unpack(rows))
    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(
      state.params, unroll
    )
    metrics = dict(metrics, total_loss=loss)
    if axis_name is not None:
      # One collective rather than many: between hosts each costs a round trip.
      count = jax.lax.psum(1, axis_name)
      grads, metrics = jax.lax.psum((grads, metrics), axis_name)
      metrics = {
        name: value if _is_sum(name) else value / count
        for name, value in metrics.items()
      }
    squares = jax.tree.map(lambda g: jnp.sum(jnp.square(g)), grads)
    grad_norm = jnp.sqrt(sum(jax.tree.leaves(squares), jnp.zeros(())))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    guarded = (metrics['total_loss'], squares, grad_norm, _floats((params, opt_state)))
    finite = _finite(guarded).all()
    # A part of the loss is named before the whole, but counts only with it.
    culprit = 1 + jnp.argmin(_finite((_parts(metrics), guarded)))

    def keep(new: types.Nest, old: types.Nest) -> types.Nest:
      return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    params = keep(params, state.params)
    state = LearnerState(
      params=params,
      opt_state=keep(opt_state, state.opt_state),
      updates=state.updates + 1,
      skipped=state.skipped + (~finite).astype(jnp.int32),
    )
    metrics = dict(
      metrics,
      grad_norm=grad_norm,
      skipped=state.skipped,
      culprit=jnp.where(finite, 0, culprit),
    )
    return state, params, metrics

  return update


class Learner:
  """`make_update` under `jax.pmap` over the devices of one or more processes.

  Of several processes (`jax.distributed`) each holds the state on its own devices and
  brings its share of each batch; all must call `update` equally often.

  Args:
    agent: the network as pure functions.
    loss_fn: see `losses.LossFn`.
    optimizer: gradients in, updates out.
    layout: of the rows that `update` takes.
    devices: that share each batch; the same in all processes, equally many of each.

  Attributes:
    agent: as given.
  """

  def __init__(
    self,
    agent: agent_lib.Agent,
    loss_fn: losses.LossFn,
    optimizer: optax.GradientTransformation,
    layout: unroll_layout.UnrollLayout,
    devices: Sequence[jax.Device] | None = None,
  ):
    self.agent = agent
    self._devices = list(devices or jax.devices())
    here = jax.process_index()
    self._local = [d for d in self._devices if d.process_index == here]
    self._optimizer = optimizer
    self._observation = layout.spec.timestep.observation
    mesh = jax.sharding.Mesh(np.array(self._local), (_AXIS,))
    self._sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(_AXIS))
    self._update = jax.pmap(
      make_update(agent, loss_fn, optimizer, layout, _AXIS),
      axis_name=_AXIS,
      devices=self._devices,
      donate_argnums=0,
    )
    # Several XLA host devices on few cores deadlock in queued collectives, so
    # each update there must end before the next one starts.
    self.must_wait = len(self._devices) > 1 and self._devices[0].platform == 'cpu'

  @property
  def num_devices(self) -> int:
    """Of all processes."""
    return len(self._devices)

  def init(self, seed: int) -> LearnerState:
    """A fresh replicated state, the same in all processes."""
    return self.replicate(init_state(self.agent, self._optimizer, jax.random.key(seed)))

  def template(self) -> LearnerState:
    """Shapes and dtypes of an unreplicated state."""
    shapes: LearnerState = jax.eval_shape(
      lambda: init_state(self.agent, self._optimizer, jax.random.key(0))
    )
    return shapes

  def replicate(self, state: LearnerState) -> LearnerState:
    """Puts an unreplicated state on every device of this process."""
    replicated: LearnerState = jax.device_put(
      jax.tree.map(
        lambda x: np.broadcast_to(np.asarray(x), (len(self._local), *x.shape)), state
      ),
      self._sharding,
    )
    return replicated

  def put(self, rows: npt.NDArray[np.uint8]) -> jax.Array:
    """Starts the transfer of this process's share of a batch to its devices.

    Args:
      rows: uint8 [B, nbytes].

    Returns:
      uint8 [local devices, B / local devices, nbytes].

    Raises:
      ValueError: B is not a multiple of the number of local devices.
    """
    count = len(self._local)
    if rows.shape[0] % count:
      raise ValueError(
        f'batch of {rows.shape[0]} unrolls does not divide over {count} devices'
      )
    shards = rows.reshape(count, rows.shape[0] // count, rows.shape[1])
    placed: jax.Array = jax.device_put(shards, self._sharding)
    return placed

  def update(
    self, state: LearnerState, rows: jax.Array
  ) -> tuple[LearnerState, types.Nest, losses.Metrics]:
    """One update; `state` is donated. Returns without waiting for the result,
    except where `must_wait`. All returned leaves have a leading axis of this
    process's devices."""
    state, params, metrics = self._update(state, rows)
    if self.must_wait:
      jax.block_until_ready(state)
    return state, params, metrics

  def speaks(self, params: types.Nest) -> bool:
    """Whether the policy of unreplicated parameters is finite on empty observations and
    on full ones. Where it is not, no actor's unroll can be."""
    one = jnp.ones(1, jnp.float32)

    def outputs(params: types.Nest, full: bool) -> tuple[jax.Array, jax.Array]:
      observation = jax.tree.map(
        lambda s: jnp.full(
          (1, *s.shape[1:]), full * (255 if s.dtype == np.uint8 else 1), s.dtype
        ),
        self._observation,
        is_leaf=lambda x: isinstance(x, types.ArraySpec),
      )
      timestep = types.TimeStep(jnp.ones(1, jnp.uint8), 0 * one, one, observation)
      state = self.agent.initial_state(1)
      action = jnp.zeros(1, jnp.int32)
      out = self.agent.step(params, jax.random.key(0), timestep, action, state)
      return out.log_prob, out.baseline

    both = jax.jit(lambda params: (outputs(params, False), outputs(params, True)))
    return all(np.isfinite(x).all() for x in jax.tree.leaves(both(params)))

  def cost(self, state: LearnerState, rows: jax.Array) -> dict[str, float]:
    """What XLA counts of one update on one device: 'flops', 'bytes accessed', ...

    Custom calls, as those of oneDNN, count for nothing.
    """
    found = self._update.lower(state, rows).compile().cost_analysis()
    return dict(found[0] if isinstance(found, list) else found or {})

  def snapshot(self, state: LearnerState) -> LearnerState:
    """A copy on the devices that outlives the donation of `state`."""
    copy: LearnerState = jax.tree.map(jnp.copy, state)
    return copy


def suspects(state: LearnerState, metrics: Mapping[str, Any]) -> list[str]:
  """What the metric `culprit` of an update stands for, in words.

  Args:
    state: the learner's, or its shapes.
    metrics: of an update.
  """
  return [
    'nothing',
    *sorted(_parts(metrics)),
    'total_loss',
    *(f'the gradient of {name}' for name in _named(state.params)),
    'the norm of the gradient',
    *(f'the new parameter {name}' for name in _named(_floats(state.params))),
    *(f"the optimiser's new {name}" for name in _named(_floats(state.opt_state))),
  ]


def _parts(metrics: Mapping[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in metrics.items() if k.endswith('_loss') and k != 'total_loss'}


def _floats(tree: types.Nest) -> types.Nest:
  """`tree` without leaves of whole numbers."""
  return jax.tree.map(
    lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, tree
  )


def _named(tree: types.Nest) -> list[str]:
  return [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


def _finite(tree: types.Nest) -> jax.Array:
  """bool [leaves], whether each is finite throughout."""
  return jnp.stack([jnp.isfinite(jnp.sum(x)) for x in jax.tree.leaves(tree)])


def _is_sum(metric: str) -> bool:
  return metric.endswith(('_loss', '_steps'))


def to_host(tree: types.Nest) -> types.Nest:
  """NumPy leaves of a replicated tree, without its device axis. Blocks."""
  return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data)[0], tree)
