"""What an actor and its inference server say to each other: bytes of a fixed layout.

A message is a header and then array after array, each [rows, ...] and aligned to eight
bytes. Shapes and dtypes are not in it: both sides derive them from the configuration,
and the fingerprint in the header says whether they agree. Nothing is decoded that
could name a type, a function or a size other than the number of rows.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from impala_jax import types
from impala_jax.acting import policy as policy_lib

_ALIGNMENT = 8
# Fingerprint, session, parameter version, rows, rows that have a state.
_HEADER = struct.Struct('<QQqII')
_MAX_ROWS = 1 << 24


class WireError(ValueError):
  """A message that does not have the form agreed on; says which clause it breaks."""


class Request(NamedTuple):
  """Asks for the actions of K environments."""

  session: int  # What `join` gave.
  ids: np.ndarray  # int32 [K], the client's own numbers of its environments.
  begins: np.ndarray  # bool [K], whether the state before this step is wanted.
  last_action: np.ndarray  # int32 [K]
  timestep: types.TimeStep  # [K, ...]


class Wire:
  """The form of requests and replies for one environment and network.

  Args:
    spec: of the environments.
    state: recurrent state of ONE environment: arrays or shape structs.
  """

  def __init__(self, spec: types.EnvironmentSpec, state: types.Nest):
    scalar = lambda dtype: types.ArraySpec((), np.dtype(dtype))
    self.num_actions = spec.num_actions
    self._request = _Form(
      (
        scalar(np.int32),
        scalar(np.uint8),
        scalar(np.int32),
        types.TimeStep(
          scalar(np.uint8), scalar(np.float32), scalar(np.float32), spec.observation
        ),
      )
    )
    logits = types.ArraySpec((spec.num_actions,), np.dtype(np.float32))
    self._decision = _Form((scalar(np.int32), scalar(np.float32), logits))
    self._state = _Form(state)
    text = repr([f.text for f in (self._request, self._decision, self._state)])
    digest = hashlib.sha256(text.encode()).digest()
    self.fingerprint = int.from_bytes(digest[:8], 'little')

  def request_bytes(self, rows: int) -> int:
    """Length of a request of so many rows."""
    return _HEADER.size + self._request.nbytes(rows)

  def pack_request(self, request: Request) -> bytes:
    """Raises ValueError where an array is not of the agreed shape or dtype."""
    _, ids, begins, last_action, timestep = request
    rows = len(ids)
    header = _HEADER.pack(self.fingerprint, request.session, 0, rows, 0)
    tree = (ids, begins.astype(np.uint8), last_action, timestep)
    return b''.join([header, *self._request.parts(tree, rows)])

  def read_request(self, message: bytes, max_rows: int) -> Request:
    """Arrays that lie in `message`, checked.

    Raises:
      WireError: it cannot be read, or names environments twice.
    """
    session, _, rows, _ = self._header(message)
    if not 1 <= rows <= max_rows:
      raise WireError(f'{rows} rows: must be 1 to {max_rows}')
    if len(message) != self.request_bytes(rows):
      raise WireError(
        f'{len(message)} bytes: {rows} rows have {self.request_bytes(rows)}'
      )
    tree, _ = self._request.read(message, _HEADER.size, rows)
    ids, begins, last_action, timestep = tree
    if len(np.unique(ids)) != rows:
      raise WireError(f'environments {ids.tolist()}: each may be there once')
    if timestep.step_type.max() > types.StepType.LAST:
      raise WireError(f'a step type is {timestep.step_type.max()}: must be 0, 1 or 2')
    if not ((last_action >= 0) & (last_action < self.num_actions)).all():
      raise WireError(f'a last action is not in [0, {self.num_actions})')
    return Request(session, ids, begins.astype(bool), last_action, timestep)

  def pack_reply(self, session: int, decision: policy_lib.Decision) -> bytes:
    """Bytes of a decision for K rows, F of them with a state."""
    action, log_prob, logits, state, version = decision
    leaves = jax.tree.leaves(state)
    begun = len(leaves[0]) if leaves else 0
    header = _HEADER.pack(self.fingerprint, session, version, len(action), begun)
    parts = self._decision.parts((action, log_prob, logits), len(action))
    states = self._state.parts(state, begun) if begun else []
    return b''.join([header, *parts, *states])

  def read_reply(self, message: bytes, rows: int, begun: int) -> policy_lib.Decision:
    """Arrays that lie in `message`.

    Args:
      message: bytes.
      rows: how many were asked about.
      begun: of which the state was asked for.

    Raises:
      WireError: it is no answer to that.
    """
    _, version, found, states = self._header(message)
    wanted = begun if self._state.fields else 0
    size = _HEADER.size + self._decision.nbytes(rows) + self._state.nbytes(wanted)
    if (found, states, len(message)) != (rows, wanted, size):
      raise WireError(
        f'{found} rows, {states} states, {len(message)} bytes: expected {rows}, '
        f'{wanted}, {size}'
      )
    decision, offset = self._decision.read(message, _HEADER.size, rows)
    state, _ = self._state.read(message, offset, wanted)
    action, log_prob, logits = decision
    if not ((action >= 0) & (action < self.num_actions)).all():
      raise WireError(f'an action is not in [0, {self.num_actions})')
    return policy_lib.Decision(action, log_prob, logits, state, version)

  def _header(self, message: bytes) -> tuple[int, int, int, int]:
    if len(message) < _HEADER.size:
      raise WireError(f'{len(message)} bytes: too short')
    fingerprint, session, version, rows, states = _HEADER.unpack_from(message)
    if fingerprint != self.fingerprint:
      raise WireError('another layout (other network, environment or version?)')
    if max(rows, states) > _MAX_ROWS:
      raise WireError(f'{max(rows, states)} rows: too many')
    return session, version, rows, states


class _Field(NamedTuple):
  shape: tuple[int, ...]
  dtype: np.dtype
  row: int  # Bytes.


class _Form:
  """A nest of arrays [rows, ...] one after the other.

  Args:
    spec: nest of what has `shape` and `dtype`, without the rows.
  """

  def __init__(self, spec: types.Nest):
    is_leaf = lambda x: hasattr(x, 'shape') and hasattr(x, 'dtype')
    named, self._tree = jax.tree_util.tree_flatten_with_path(spec, is_leaf=is_leaf)
    self.fields = []
    for _, leaf in named:
      dtype = np.dtype(leaf.dtype)
      row = dtype.itemsize * math.prod(leaf.shape)
      self.fields.append(_Field(tuple(leaf.shape), dtype, row))
    self.text = [
      (jax.tree_util.keystr(path), f.shape, f.dtype.str)
      for (path, _), f in zip(named, self.fields, strict=True)
    ]

  def nbytes(self, rows: int) -> int:
    return sum(_aligned(rows * f.row) for f in self.fields)

  def parts(self, tree: types.Nest, rows: int) -> Sequence[Any]:
    """What `bytes.join` takes."""
    out: list[Any] = []
    for f, x in zip(self.fields, jax.tree.leaves(tree), strict=True):
      if x.dtype != f.dtype or x.shape != (rows, *f.shape):
        raise ValueError(
          f'{x.dtype}{list(x.shape)}: expected {f.dtype}{[rows, *f.shape]}'
        )
      out.append(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
      out.append(bytes(_aligned(rows * f.row) - rows * f.row))
    return out

  def read(self, message: bytes, offset: int, rows: int) -> tuple[types.Nest, int]:
    """The nest at `offset`, and where it ends."""
    leaves = []
    for f in self.fields:
      count = rows * math.prod(f.shape)
      # Of an empty buffer NumPy takes no view.
      flat = (
        np.frombuffer(message, f.dtype, count, offset)
        if count
        else np.empty(0, f.dtype)
      )
      leaves.append(flat.reshape(rows, *f.shape))
      offset += _aligned(rows * f.row)
    return jax.tree_util.tree_unflatten(self._tree, leaves), offset


def _aligned(nbytes: int) -> int:
  return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
