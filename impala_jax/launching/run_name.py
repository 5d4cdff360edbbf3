"""A run's name: made once, kept in its directory, borne by all that engines have of it.

Directories may be called alike, in whatever script; names end in ten random letters.
"""

import json
import os
import pathlib
import re
import secrets
import time

from impala_jax.runtime.run_directory import RunDirectory

_LETTERS = 'abcdefghijklmnopqrstuvwxyz234567'
_NEW = '0' * 10  # In place of the letters, which have no 0, before a run has begun.
# Engines put role, index and letters of their own behind it: 63 characters in all.
_LENGTH = 40
_NAME = re.compile(r'[a-z]([-a-z0-9]{0,38}[a-z0-9])?')
_WHOLE = 5.0  # Seconds for the process that makes the file to write its line.


class RunNameError(Exception):
  """The file of the name is unreadable, or cannot be written; says which."""


def read(run_dir: pathlib.Path) -> str:
  """The name of the run in that directory; empty where it has none of its own.

  Raises:
    RunNameError: see there.
  """
  path = RunDirectory(run_dir).run_name
  text = _whole_text(path)
  if not text:
    return ''
  try:
    found = json.loads(text)
    name, home = found['name'], found.get('directory')
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise RunNameError(f'{path} is unreadable: {e!r}') from e
  if not (isinstance(name, str) and _NAME.fullmatch(name)):
    raise RunNameError(
      f'{path}: name is {name!r}: must be at most {_LENGTH} of a-z, 0-9 and dashes, '
      'first a letter'
    )
  return '' if home and is_copy(run_dir, pathlib.Path(home), name) else name


def name_of(run_dir: pathlib.Path) -> str:
  """The name, or of a run that has not begun a legal one that no run ever has."""
  return read(run_dir) or make(run_dir, _NEW)


def ensure(run_dir: pathlib.Path) -> str:
  """The name, made now where there is none; all who ask at the same time agree.

  A copy of a run's directory is another run and gets another name.

  Raises:
    RunNameError: see there.
  """
  path = RunDirectory(run_dir).run_name
  while not (name := read(run_dir)):
    made = make(run_dir, ''.join(secrets.choice(_LETTERS) for _ in range(len(_NEW))))
    text = json.dumps({'name': made, 'directory': str(run_dir.absolute())})
    try:
      descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
      with os.fdopen(descriptor, 'w') as file:
        file.write(f'{text}\n')
    except FileExistsError:
      if not read(run_dir):  # It is of the run of which this is a copy.
        path.unlink(missing_ok=True)
    except OSError as e:
      raise RunNameError(f'cannot write {path}: {e.strerror}') from e
  return name


def make(run_dir: pathlib.Path, letters: str) -> str:
  """A DNS label, with as much of the directory's name as fits and can be written."""
  plain = re.sub(r'[^a-z0-9]+', '-', f'impala-{run_dir.absolute().name}'.lower())
  return f'{plain[: _LENGTH - len(letters) - 1].strip("-")}-{letters}'


def is_copy(run_dir: pathlib.Path, home: pathlib.Path, name: str) -> bool:
  """Whether the run of that name is still in `home`, and `run_dir` is not that."""
  try:
    if run_dir.samefile(home):
      return False
    return bool(json.loads(RunDirectory(home).run_name.read_text())['name'] == name)
  except (OSError, ValueError, KeyError, TypeError):
    return False  # It has moved here.


def _whole_text(path: pathlib.Path) -> str:
  """Of a file that somebody may be about to write; empty where there is none."""
  deadline = time.monotonic() + _WHOLE
  while True:
    try:
      text = path.read_text()
    except FileNotFoundError:
      return ''
    except (OSError, ValueError) as e:
      raise RunNameError(f'{path} is unreadable: {e}') from e
    if text or time.monotonic() > deadline:
      return text or '{}'
    time.sleep(0.02)
