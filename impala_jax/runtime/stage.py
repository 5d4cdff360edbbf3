"""What a role's process does before it can report: lines of its log, for launchers."""

import contextlib
import pathlib

_MARK = 'STAGE: '
_TAIL = 1 << 14  # Bytes of a log that are looked at.
UNDER_WAY = 'under way'


def enter(words: str) -> None:
  """This process does that from now on."""
  with contextlib.suppress(OSError):  # Of a full disk something else will tell.
    print(f'{_MARK}{words}', flush=True)


def of_log(log: pathlib.Path) -> str:
  """The newest stage in a log; empty where none is there."""
  try:
    with log.open('rb') as f:
      f.seek(max(0, log.stat().st_size - _TAIL))
      lines = f.read().decode(errors='replace').splitlines()
  except OSError:
    return ''
  found = [line for line in lines if line.startswith(_MARK)]
  return found[-1].removeprefix(_MARK) if found else ''
