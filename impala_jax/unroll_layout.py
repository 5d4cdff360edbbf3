"""The binary form of an unroll: one row of bytes.

Each unroll is a fixed number of bytes: a header, then every array of the `Unroll`
at a fixed, aligned offset. So an actor writes steps in place, a transport moves
opaque rows, a batch is one uint8 array that goes to a device in a single copy,
and the arrays are cut out of it there (`UnrollLayout.unpack`).
"""

import hashlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import xxhash

from impala_jax import types

_ALIGNMENT = 64
# Both ends must agree on `fingerprint`, which covers every name, shape and dtype.
HEADER = np.dtype(
  [
    ('fingerprint', '<u8'),
    ('checksum', '<u8'),  # xxh3-64 of the row after this field.
    ('actor_id', '<i4'),
    ('incarnation', '<i4'),  # Changes when an actor restarts.
    ('sequence', '<i8'),  # Counts the unrolls of one actor incarnation.
    ('version', '<i8'),  # Learner updates behind the parameters at step 0.
    ('env_id', '<i4'),
    ('task_id', '<i4'),
    ('padding', 'V16'),
  ]
)
_CHECKED_FROM = HEADER.fields['actor_id'][1]  # type: ignore[index]


# Numbers beyond it make squares that are not finite, and so cost a whole batch.
_LARGEST = 1e15


class Field(NamedTuple):
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype[Any]
  offset: int
  nbytes: int
  bounds: tuple[float, float] | None  # Of its numbers; None for any.


def aligned_empty(shape: tuple[int, ...]) -> types.Rows:
  """Uninitialised uint8 array whose first byte is 64-byte aligned.

  XLA's CPU client takes such an array without copying it.
  """
  size = math.prod(shape)
  block = np.empty(size + _ALIGNMENT, np.uint8)
  start = -block.ctypes.data % _ALIGNMENT
  return block[start : start + size].reshape(shape)


class UnrollLayout:
  """Where each array of an unroll lies in its row of `nbytes` bytes.

  Args:
    spec: an `Unroll` whose leaves are `types.ArraySpec` with the time axes of an
      unbatched unroll (`[T + 1, ...]`, `[T]`, `[]`).
    num_actions: A; None where it is not known.
  """

  def __init__(self, spec: types.Unroll, num_actions: int | None = None):
    leaves, self._treedef = jax.tree_util.tree_flatten_with_path(
      spec, is_leaf=lambda x: isinstance(x, types.ArraySpec)
    )
    self.spec = spec
    fields = []
    offset = HEADER.itemsize
    for path, leaf in leaves:
      dtype = np.dtype(leaf.dtype)
      nbytes = dtype.itemsize * math.prod(leaf.shape)
      name = jax.tree_util.keystr(path).lstrip('.')
      bounds = _bounds(name, dtype, num_actions or 2**31)
      fields.append(Field(name, tuple(leaf.shape), dtype, offset, nbytes, bounds))
      offset += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    self.fields: tuple[Field, ...] = tuple(fields)
    self.nbytes = offset
    text = repr([(f.name, f.shape, f.dtype.str, f.offset) for f in fields])
    self.fingerprint = int.from_bytes(
      hashlib.sha256(text.encode()).digest()[:8], 'little'
    )

  def allocate(self, rows: int) -> types.Rows:
    """Uninitialised uint8 [rows, nbytes], each row 64-byte aligned."""
    return aligned_empty((rows, self.nbytes))

  def views(self, rows: types.Rows) -> types.Unroll:
    """NumPy views [rows, ...] (or [...] of one row) into uint8 `rows`."""
    lead = rows.shape[:-1]
    leaves = []
    for f in self.fields:
      part = rows[..., f.offset : f.offset + f.nbytes].view(f.dtype)
      leaves.append(part.reshape(lead + f.shape))
      assert f.nbytes == 0 or np.shares_memory(leaves[-1], rows), f.name
    unroll: types.Unroll = jax.tree_util.tree_unflatten(self._treedef, leaves)
    return unroll

  def header(self, rows: types.Rows) -> npt.NDArray[np.void]:
    """Structured view (dtype `HEADER`) of shape `rows.shape[:-1]`."""
    return rows[..., : HEADER.itemsize].view(HEADER)[..., 0]

  def pack(self, row: types.Rows, unroll: types.Unroll) -> None:
    """Copies a whole `unroll` into `row` (the header is left to `seal`).

    Raises:
      ValueError: names the field whose shape, dtype or presence is wrong.
    """
    leaves = jax.tree_util.tree_leaves_with_path(unroll)
    given = {jax.tree_util.keystr(p).lstrip('.'): np.asarray(x) for p, x in leaves}
    expected = {f.name: f for f in self.fields}
    for name in sorted(given.keys() ^ expected.keys()):
      state = 'missing' if name in expected else 'not expected'
      raise ValueError(f'unroll field {name!r} is {state}')
    for f in self.fields:
      x = given[f.name]
      if x.shape != f.shape or x.dtype != f.dtype:
        raise ValueError(
          f'unroll field {f.name!r} is {x.dtype}{list(x.shape)}, '
          f'expected {f.dtype}{list(f.shape)}'
        )
      row[f.offset : f.offset + f.nbytes].view(f.dtype).reshape(f.shape)[...] = x

  def seal(
    self,
    row: types.Rows,
    *,
    actor_id: int,
    incarnation: int,
    sequence: int,
    version: int,
    env_id: int = 0,
    task_id: int = 0,
  ) -> None:
    """Writes the header of one finished row, checksum included."""
    row[: HEADER.itemsize].view(HEADER)[0] = (
      self.fingerprint,
      0,
      actor_id,
      incarnation,
      sequence,
      version,
      env_id,
      task_id,
      b'',
    )
    self.header(row)['checksum'] = _checksum(row)

  def problem(self, row: types.Rows) -> str | None:
    """Why a received row must be refused, or None where it is sound."""
    if row.dtype != np.uint8 or row.shape != (self.nbytes,):
      return f'is {row.dtype}{list(row.shape)}, expected uint8[{self.nbytes}]'
    header = self.header(row)
    if int(header['fingerprint']) != self.fingerprint:
      return 'has another layout (other network, unroll length or environment?)'
    if int(header['checksum']) != _checksum(row):
      return 'fails its checksum'
    return None

  def impossible(self, rows: types.Rows) -> dict[int, str]:
    """Which rows hold numbers that no actor can have meant, and which numbers.

    NaN and infinities anywhere (a forbidden action's behaviour logit may be -inf),
    actions and step types that there are not, discounts outside of [0, 1].

    Args:
      rows: uint8 [N, nbytes].

    Returns:
      Why a row must be refused, by its index; empty where all may be had.
    """
    found: dict[int, str] = {}
    with np.errstate(invalid='ignore'):  # NaN are what is looked for.
      for f in self.fields:
        if f.bounds is None or not f.nbytes:
          continue
        numbers = rows[:, f.offset : f.offset + f.nbytes].view(f.dtype)
        low, high = f.bounds
        # Of NaN no comparison holds. All rows at once: most of the cost are the calls.
        if numbers.min() >= low and numbers.max() <= high:
          continue
        ranges = zip(numbers.min(axis=1), numbers.max(axis=1), strict=True)
        for i, (least, most) in enumerate(ranges):
          if not (least >= low and most <= high):
            allowed = f'must lie in [{low:g}, {high:g}]'
            found.setdefault(i, f'{f.name} lies in [{least}, {most}]: {allowed}')
    return found

  def unpack(self, rows: jax.Array) -> types.Unroll:
    """Cuts uint8 `rows` [..., nbytes] into the arrays [..., *shape], jittable."""
    lead = rows.shape[:-1]
    leaves = []
    for f in self.fields:
      part = rows[..., f.offset : f.offset + f.nbytes]
      if f.dtype != np.uint8:
        part = part.reshape((*lead, f.nbytes // f.dtype.itemsize, f.dtype.itemsize))
        part = jax.lax.bitcast_convert_type(part, f.dtype)
      leaves.append(jnp.reshape(part, lead + f.shape))
    unroll: types.Unroll = jax.tree_util.tree_unflatten(self._treedef, leaves)
    return unroll


def unroll_spec(
  environment: types.EnvironmentSpec,
  agent_state: types.Nest,
  unroll_length: int,
  with_logits: bool = False,
) -> types.Unroll:
  """The `ArraySpec` tree of an unroll of `unroll_length` steps.

  Args:
    environment: its observation and number of actions.
    agent_state: recurrent state of ONE environment (arrays or shape structs
      without a batch axis).
    unroll_length: T.
    with_logits: whether the behaviour logits travel too.
  """
  t = unroll_length

  is_spec = lambda x: isinstance(x, types.ArraySpec)

  def lead(n: int, tree: types.Nest) -> types.Nest:
    return jax.tree.map(
      lambda s: types.ArraySpec((n, *s.shape), np.dtype(s.dtype)),
      tree,
      is_leaf=is_spec,
    )

  f4, i4, u1 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.uint8)
  logits = types.ArraySpec((t, environment.num_actions), f4) if with_logits else None
  return types.Unroll(
    timestep=types.TimeStep(
      step_type=types.ArraySpec((t + 1,), u1),
      reward=types.ArraySpec((t + 1,), f4),
      discount=types.ArraySpec((t + 1,), f4),
      observation=lead(t + 1, environment.observation),
    ),
    action=types.ArraySpec((t,), i4),
    behaviour_log_prob=types.ArraySpec((t,), f4),
    behaviour_logits=logits,
    last_action=types.ArraySpec((), i4),
    agent_state=jax.tree.map(
      lambda s: types.ArraySpec(tuple(s.shape), np.dtype(s.dtype)),
      agent_state,
      is_leaf=is_spec,
    ),
    task_id=types.ArraySpec((), i4),
  )


def _bounds(
  name: str, dtype: np.dtype[Any], num_actions: int
) -> tuple[float, float] | None:
  known = {
    'timestep.step_type': (types.StepType.FIRST, types.StepType.LAST),
    'timestep.discount': (0.0, 1.0),
    'action': (0, num_actions - 1),
    'last_action': (0, num_actions - 1),
    'behaviour_logits': (-math.inf, _LARGEST),
    'task_id': (0, 2**31 - 1),
  }
  floating = jnp.issubdtype(dtype, np.floating)
  return known.get(name, (-_LARGEST, _LARGEST) if floating else None)


def _checksum(row: types.Rows) -> int:
  return xxhash.xxh3_64_intdigest(row[_CHECKED_FROM:].data)
