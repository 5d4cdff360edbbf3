"""Checkpoints: one verified file each, written aside and renamed.

What a file is, and which are sound, is in `runtime.checkpoint_files`. A run cut off in
the middle of a write goes on from the checkpoint before.
"""

import concurrent.futures
import logging
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization

from impala_jax import config as config_lib
from impala_jax.learning import learner as learner_lib
from impala_jax.runtime import checkpoint_files, files

CheckpointError = checkpoint_files.CheckpointError
paths = checkpoint_files.paths


class Checkpoint(NamedTuple):
  state: Any  # As the template given to `load`, NumPy leaves.
  metadata: dict[str, Any]
  path: pathlib.Path


def save(
  directory: pathlib.Path, step: int, state: Any, metadata: dict[str, Any]
) -> pathlib.Path:
  """Writes `checkpoint_<step>.msgpack` atomically and durably.

  Args:
    directory: made where it is not there.
    step: updates.
    state: tree of arrays.
    metadata: `updates` and `frames` at least; see `checkpoint_files`.
  """
  directory.mkdir(parents=True, exist_ok=True)
  state = jax.tree.map(np.asarray, state)
  payload = serialization.msgpack_serialize(
    {'metadata': metadata, 'state': serialization.to_state_dict(state)}
  )
  path = checkpoint_files.path_of(directory, step)
  aside = directory / f'.{path.name}.{os.getpid()}'
  try:
    with files.naming(path), open(aside, 'wb') as f:
      f.write(checkpoint_files.sealed(payload))
      f.write(payload)
      f.flush()
      os.fsync(f.fileno())
    os.replace(aside, path)
  finally:
    aside.unlink(missing_ok=True)
  return path


def load(path: pathlib.Path, template: Any) -> Checkpoint:
  """Reads and verifies one file.

  Args:
    path: a file written by `save`.
    template: tree of arrays or shape structs that the state must match.

  Raises:
    CheckpointError: the file is damaged or of another shape; says which field.
  """
  data = read(path)
  state = data['state']
  expected = jax.tree_util.tree_leaves_with_path(template)
  try:
    restored = serialization.from_state_dict(template, state)
    found = [np.asarray(x) for x in jax.tree_util.tree_leaves(restored)]
    pairs = list(zip(expected, found, strict=True))
  except Exception as e:  # A foreign state may be anything.
    raise CheckpointError(f'{path} is of another network or optimiser: {e}') from e
  for (name, want), got in pairs:
    if got.shape != want.shape or got.dtype != want.dtype:
      raise CheckpointError(
        f'{path}: {jax.tree_util.keystr(name)} is {got.dtype}{list(got.shape)}, '
        f'this configuration needs {want.dtype}{list(want.shape)}'
      )
  return Checkpoint(restored, data['metadata'], path)


def read(path: pathlib.Path) -> dict[str, Any]:
  """Verified content of a checkpoint file: `state` and `metadata` as plain dicts.

  Raises:
    CheckpointError: it is not sound; says why.
  """
  payload = checkpoint_files.payload(path)
  return checkpoint_files.judged(path, lambda: serialization.msgpack_restore(payload))


def latest(directory: pathlib.Path, template: Any) -> Checkpoint | None:
  """The newest sound checkpoint; damaged ones are skipped with a warning.

  Raises:
    CheckpointError: a sound file does not fit `template`.
  """
  found = checkpoint_files.newest(directory)
  return load(found.path, template) if found else None


def go_on(
  sound: Sequence[checkpoint_files.Stored],
  config: config_lib.Config,
  make_learner: Callable[[int], learner_lib.Learner],
) -> tuple[learner_lib.Learner, Checkpoint | None]:
  """The learner of a run that goes on from a checkpoint, and what is in that.

  Newer ones of another network, if an older one fits, are foreign and put aside.

  Args:
    sound: the checkpoints, oldest first; none for a run from its beginning.
    config: of the run.
    make_learner: see `Components.make_learner`.

  Raises:
    CheckpointError: all are of another network.
  """
  if not sound:
    return make_learner(0), None
  foreign: list[tuple[pathlib.Path, CheckpointError]] = []
  for path, metadata in reversed(sound):
    # The schedule goes on where it was, with updates of today's size.
    learner = make_learner(
      checkpoint_files.frames_ahead(metadata, config.frames_per_update)
    )
    try:
      checkpoint = load(path, learner.template())
    except CheckpointError as e:
      foreign.append((path, e))
      continue
    for other, why in foreign:
      checkpoint_files.put_aside(other, str(why))
    logging.info('goes on from %s', path)
    return learner, checkpoint
  raise foreign[0][1]


class Saver:
  """Saves in a background thread, one at a time, and keeps the newest `keep`.

  Only what is known to be sound counts as kept, and only that is ever deleted: what it
  has saved itself, and what it is told of.

  Args:
    directory: of the run's checkpoints.
    keep: how many.
    sound: those that are there already, oldest first, see `own_checkpoints`.
    lineage: see there.
    check: called before each save; raises where this process must not write any more.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    keep: int,
    sound: Sequence[checkpoint_files.Stored] = (),
    lineage: str = '',
    check: Callable[[], None] = lambda: None,
  ):
    self._directory = directory
    self._keep = keep
    # Some may have turned out to be of another network, and were put aside.
    self._sound = [s.path for s in sound if s.path.exists()]
    self._lineage = lineage
    self._check = check
    self._pool = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
    self._pending: concurrent.futures.Future[None] | None = None

  @property
  def busy(self) -> bool:
    return self._pending is not None and not self._pending.done()

  def save(self, step: int, fetch: Callable[[], Any], metadata: dict[str, Any]) -> None:
    """Queues a save; `fetch` is called in the thread and gives the state.

    Raises:
      OSError: the previous save failed (full disk, say).
    """
    self.wait()
    self._pending = self._pool.submit(self._save, step, fetch, metadata)

  def wait(self) -> None:
    """Blocks until the queued save is on disk; raises its error."""
    pending, self._pending = self._pending, None
    if pending is not None:
      pending.result()

  def close(self) -> None:
    self._pool.shutdown()

  def _save(
    self, step: int, fetch: Callable[[], Any], metadata: dict[str, Any]
  ) -> None:
    state = fetch()
    self._check()
    path = save(self._directory, step, state, {**metadata, 'lineage': self._lineage})
    # A run that goes on and ends at once saves the same number again.
    self._sound = [p for p in self._sound if p != path] + [path]
    for old in self._sound[: -self._keep]:
      old.unlink(missing_ok=True)
    self._sound = self._sound[-self._keep :]
