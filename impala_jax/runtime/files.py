"""Small files that several processes share: JSON, whole or by lines."""

import json
import os
import pathlib
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
