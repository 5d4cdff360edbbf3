"""Small files that several processes share: JSON, whole or by lines."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any


def write_json(path: pathlib.Path, data: Any) -> None:
  """Writes aside and renames, so that a reader never sees half a file."""
  aside = path.with_name(f'.{path.name}.{os.getpid()}')
  aside.write_text(json.dumps(data, indent=1))
  os.replace(aside, path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """What `write_json` wrote; empty if it is not there."""
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    return {}


def cut_json_lines(
  path: pathlib.Path, aside: pathlib.Path, after: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
  """Ends a `.jsonl` file before the first record that is `after` where a run goes on.

  A last line that a crash has cut off goes, too: else the next record would be glued to
  it. What goes is added to the file `aside`, so that nothing is lost.

  Returns:
    The last record that stays; empty where there is none.
  """
  last: dict[str, Any] = {}
  end = 0
  if not path.exists():
    return last
  with open(path, 'rb') as f:
    for line in f:
      record = _record(line)
      if not line.endswith(b'\n') or (record and after(record)):
        break
      last, end = record or last, end + len(line)
    f.seek(end)
    lost = f.read()
  if lost:
    with open(aside, 'ab') as f:
      f.write(lost if lost.endswith(b'\n') else lost + b'\n')
    os.truncate(path, end)
  return last


def _record(line: bytes) -> dict[str, Any]:
  try:
    found = json.loads(line)
  except (ValueError, RecursionError):
    return {}
  return found if isinstance(found, dict) else {}


def read_json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Records of a `.jsonl` file; a line cut off by a crash is skipped."""
  lines = path.read_bytes().splitlines() if path.exists() else []
  return [record for record in map(_record, lines) if record]
