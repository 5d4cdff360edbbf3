"""Small files that several processes share: JSON, whole or by lines."""

import json
import os
import pathlib
from typing import Any


def write_json(path: pathlib.Path, data: Any, secret: bool = False) -> None:
  """Writes aside and renames, so that a reader never sees half a file.

  Args:
    path: of the file.
    data: what JSON can hold.
    secret: only the user of this process may read it.
  """
  aside = path.with_name(f'.{path.name}.{os.getpid()}')
  if secret:  # From the first byte on.
    aside.unlink(missing_ok=True)
    os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
  aside.write_text(json.dumps(data, indent=1))
  os.replace(aside, path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """What `write_json` wrote; empty if it is not there."""
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    return {}


def read_json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Records of a `.jsonl` file; a line cut off by a crash is skipped."""
  records = []
  if path.exists():
    for line in path.read_text().splitlines():
      try:
        records.append(json.loads(line))
      except ValueError:
        continue
  return records
