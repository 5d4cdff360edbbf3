"""Small files in a run directory by which launchers and supervisors agree.

`supervised/<role>-<index>.json` says what a supervisor knows of its process: also the
incarnation, which grows with each start on whatever host, because the next one reads
it there. `ended.json` says that the run has ended, and why.
"""

import json
import pathlib
import time
from typing import Any

from impala_jax import metrics


def record_path(run_dir: pathlib.Path, role: str, index: int) -> pathlib.Path:
  return run_dir / 'supervised' / f'{role}-{index}.json'


def read_record(path: pathlib.Path) -> dict[str, Any]:
  """A JSON file of the run directory; empty if it is not there."""
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    return {}


def end_run(run_dir: pathlib.Path, reason: str, cause: str = '') -> None:
  """Tells all supervisors; the first reason stands."""
  if not (run_dir / 'ended.json').exists():
    metrics.write_json(
      run_dir / 'ended.json', {'reason': reason, 'cause': cause, 'time': time.time()}
    )


def reset(run_dir: pathlib.Path) -> None:
  """Before a new launch: nothing has ended or failed; incarnations stay."""
  for name in ('ended.json', 'address.json'):
    (run_dir / name).unlink(missing_ok=True)
  for path in (run_dir / 'supervised').glob('*.json'):
    metrics.write_json(path, {'incarnation': read_record(path).get('incarnation', -1)})


def log_path(run_dir: pathlib.Path, role: str, index: int) -> pathlib.Path:
  return run_dir / 'logs' / f'{log_name(role, index)}.log'


def log_name(role: str, index: int) -> str:
  """Actors are numbered always, other roles from the second process on."""
  return f'{role}-{index}' if role == 'actor' or index else role
