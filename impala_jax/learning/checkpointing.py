"""Checkpoints: one verified file each, written aside and renamed.

A file is a magic line, the SHA-256 of what follows, and a msgpack of the state
and its metadata. `latest` skips damaged files with a warning, so a run cut off in
the middle of a write goes on from the one before.
"""

import concurrent.futures
import hashlib
import logging
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization

from impala_jax.runtime import files

_MAGIC = b'impala_jax checkpoint 1\n'
_NAME = re.compile(r'checkpoint_(\d{10})\.msgpack')


class CheckpointError(Exception):
  """A file that is not a sound checkpoint, or of another network."""


class Checkpoint(NamedTuple):
  state: Any  # As the template given to `load`, NumPy leaves.
  metadata: dict[str, Any]
  path: pathlib.Path


def save(
  directory: pathlib.Path, step: int, state: Any, metadata: dict[str, Any]
) -> pathlib.Path:
  """Writes `checkpoint_<step>.msgpack` atomically and durably."""
  directory.mkdir(parents=True, exist_ok=True)
  state = jax.tree.map(np.asarray, state)
  payload = serialization.msgpack_serialize(
    {'metadata': metadata, 'state': serialization.to_state_dict(state)}
  )
  path = directory / f'checkpoint_{step:010d}.msgpack'
  aside = directory / f'.{path.name}.{os.getpid()}'
  try:
    with files.naming(path), open(aside, 'wb') as f:
      f.write(_MAGIC + hashlib.sha256(payload).digest())
      f.write(payload)
      f.flush()
      os.fsync(f.fileno())
    os.replace(aside, path)
  finally:
    aside.unlink(missing_ok=True)
  return path


def paths(directory: pathlib.Path) -> list[pathlib.Path]:
  """The checkpoints of a directory, oldest first."""
  if not directory.is_dir():
    return []
  return sorted(p for p in directory.iterdir() if _NAME.fullmatch(p.name))


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
  try:
    restored = serialization.from_state_dict(template, state)
  except (ValueError, KeyError) as e:
    raise CheckpointError(f'{path} is of another network or optimiser: {e}') from e
  expected = jax.tree_util.tree_leaves_with_path(template)
  found = jax.tree_util.tree_leaves(restored)
  for (name, want), got in zip(expected, found, strict=True):
    if got.shape != want.shape or got.dtype != want.dtype:
      raise CheckpointError(
        f'{path}: {jax.tree_util.keystr(name)} is {got.dtype}{list(got.shape)}, '
        f'this configuration needs {want.dtype}{list(want.shape)}'
      )
  return Checkpoint(restored, data['metadata'], path)


def read(path: pathlib.Path) -> dict[str, Any]:
  """Verified content of a checkpoint file: `state` and `metadata` as plain dicts."""
  try:
    content = path.read_bytes()
  except OSError as e:
    raise CheckpointError(f'cannot read {path}: {e.strerror}') from e
  start = len(_MAGIC) + hashlib.sha256().digest_size
  payload = content[start:]
  if content[: len(_MAGIC)] != _MAGIC:
    raise CheckpointError(f'{path} is not a checkpoint')
  if hashlib.sha256(payload).digest() != content[len(_MAGIC) : start]:
    raise CheckpointError(f'{path} is damaged: checksum differs')
  data: dict[str, Any] = serialization.msgpack_restore(payload)
  return data


def latest(directory: pathlib.Path, template: Any) -> Checkpoint | None:
  """The newest sound checkpoint; damaged ones are skipped with a warning.

  Raises:
    CheckpointError: a sound file does not fit `template`.
  """
  for path in reversed(paths(directory)):
    try:
      read(path)
    except CheckpointError as e:
      logging.warning('skipped: %s', e)
      continue
    return load(path, template)
  return None


class Saver:
  """Saves in a background thread, one at a time, and keeps the newest `keep`."""

  def __init__(self, directory: pathlib.Path, keep: int):
    self._directory = directory
    self._keep = keep
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
    save(self._directory, step, fetch(), metadata)
    for path in paths(self._directory)[: -self._keep]:
      path.unlink(missing_ok=True)
