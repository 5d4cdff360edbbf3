"""Checkpoint files without their arrays: which there are, what they say, which count.

A file is a magic line, the SHA-256 of what follows, and a msgpack of `state` and
`metadata`. `learning.checkpointing` writes them and reads their states; this needs no
JAX, so that a launcher can look at them.
"""

import hashlib
import logging
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgpack

_MAGIC = b'impala_jax checkpoint 1\n'
_NAME = re.compile(r'checkpoint_(\d{10})\.msgpack')


class CheckpointError(Exception):
  """A file that is not a sound checkpoint, or of another network."""


class Stored(NamedTuple):
  """A sound file."""

  path: pathlib.Path
  metadata: dict[str, Any]  # `updates` and `frames`, whole numbers, at least.


class Survey(NamedTuple):
  """All files of a directory, each oldest first."""

  sound: list[Stored]
  others: list[tuple[pathlib.Path, str]]  # With what is wrong.

  @property
  def newest(self) -> Stored | None:
    return self.sound[-1] if self.sound else None

  def raise_if_none_is_sound(self) -> None:
    """Raises CheckpointError where there are files, and none of them is sound.

    A run does not begin anew unless somebody says so.
    """
    if self.others and not self.sound:
      path, why = self.others[-1]
      more = f', and {len(self.others) - 1} more' if self.others[1:] else ''
      raise CheckpointError(
        f'no checkpoint in {path.parent} is sound: {why}{more}; --resume --start_anew '
        'puts them aside and begins at 0'
      )


def path_of(directory: pathlib.Path, updates: int) -> pathlib.Path:
  return directory / f'checkpoint_{updates:010d}.msgpack'


def paths(directory: pathlib.Path) -> list[pathlib.Path]:
  """The checkpoints of a directory, oldest first."""
  if not directory.is_dir():
    return []
  return sorted(p for p in directory.iterdir() if _NAME.fullmatch(p.name))


def sealed(payload: bytes) -> bytes:
  """What stands before `payload` in its file."""
  return _MAGIC + hashlib.sha256(payload).digest()


def payload(path: pathlib.Path) -> bytes:
  """What `sealed` was told. Raises CheckpointError."""
  try:
    content = path.read_bytes()
  except OSError as e:
    raise CheckpointError(f'cannot read {path}: {e.strerror}') from e
  start = len(_MAGIC) + hashlib.sha256().digest_size
  found = content[start:]
  if content[: len(_MAGIC)] != _MAGIC:
    raise CheckpointError(f'{path} is not a checkpoint')
  if content[:start] != sealed(found):
    raise CheckpointError(f'{path} is damaged: checksum differs')
  return found


def read_metadata(path: pathlib.Path) -> dict[str, Any]:
  """Raises CheckpointError where the file is not sound."""
  found = payload(path)
  # Arrays are extensions of msgpack.
  return judged(path, lambda: msgpack.unpackb(found, ext_hook=lambda *_: None))[
    'metadata'
  ]


def judged(path: pathlib.Path, decode: Callable[[], Any]) -> dict[str, Any]:
  """What `decode` gives, if it is what a checkpoint holds; else CheckpointError."""
  try:
    data = decode()
  except Exception as e:  # Foreign bytes may raise anything.
    raise CheckpointError(f'{path} is not a checkpoint: {e!r}') from e
  if not isinstance(data, dict) or not isinstance(data.get('metadata'), dict):
    raise CheckpointError(f'{path} is not a checkpoint: it holds no metadata')
  if not isinstance(data.get('state'), dict):
    raise CheckpointError(f'{path} is not a checkpoint: it holds no state')
  metadata = data['metadata']
  for name, kinds, default, end in (
    ('updates', int, None, 2**31),
    ('frames', int, None, 2**63),
    ('episodes', int, 0, 2**63),
    ('wall_seconds', int | float, 0, 1e12),
  ):
    value = metadata.get(name, default)
    right = isinstance(value, kinds) and not isinstance(value, bool)
    if not right or not 0 <= value < end:
      raise CheckpointError(
        f'{path} is not a checkpoint: its {name} is {metadata.get(name)!r}'
      )
  return data


def newest(directory: pathlib.Path) -> Stored | None:
  """The newest sound one; damaged ones are skipped with a warning."""
  for path in reversed(paths(directory)):
    try:
      return stored(path)
    except CheckpointError as e:
      logging.warning('skipped: %s', e)
  return None


def survey(
  directory: pathlib.Path,
  foreign: Callable[[Mapping[str, Any]], Sequence[str]] = lambda _: (),
) -> Survey:
  """Reads all files of a directory.

  Args:
    directory: need not be there.
    foreign: of the metadata of a sound file: why it is not of this run.
  """
  sound, others = [], []
  for path in paths(directory):
    try:
      one = stored(path)
    except CheckpointError as e:
      if os.path.lexists(path):  # Else the run goes on meanwhile, and has deleted it.
        others.append((path, str(e)))
      continue
    if why := foreign(one.metadata):
      others.append((path, f'{path} is of another run: {"; ".join(why)}'))
    else:
      sound.append(one)
  return Survey(sound, others)


def stored(path: pathlib.Path) -> Stored:
  """One file. Raises CheckpointError also where its name tells another number."""
  metadata = read_metadata(path)
  if path != path_of(path.parent, metadata['updates']):
    raise CheckpointError(f'{path} holds another number: {metadata["updates"]} updates')
  return Stored(path, metadata)


def put_aside(path: pathlib.Path, why: str) -> None:
  """Renames a file that is no checkpoint of this run, so that it is in nobody's way."""
  for number in range(1, 1000):
    aside = path.with_name(
      f'{path.name}.damaged' + (f'-{number}' if number > 1 else '')
    )
    if not aside.exists():
      break
  path.rename(aside)
  logging.warning('put aside as %s: %s', aside.name, why)


def remove_unfinished(directory: pathlib.Path) -> None:
  """Deletes what those left aside who were killed while they saved."""
  for path in directory.glob('.checkpoint_*.msgpack.*'):
    path.unlink(missing_ok=True)


def frames_ahead(metadata: Mapping[str, Any], frames_per_update: int) -> int:
  """Frames that a run has beyond its updates times today's frames of one.

  It is what updates of other sizes left; a run that never changed has 0. Frames after
  any number of updates from now on are `updates * frames_per_update` and this.

  Args:
    metadata: of the checkpoint gone on from; empty for a run from its beginning.
    frames_per_update: of today's settings.
  """
  if not metadata:
    return 0
  return int(metadata['frames']) - int(metadata['updates']) * frames_per_update
