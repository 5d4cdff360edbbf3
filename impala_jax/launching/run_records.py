"""Small files in a run directory by which launchers and supervisors agree.

`supervised/<role>-<index>.json` says what a supervisor knows of its process: also the
incarnation, which grows with each start on whatever host, because the next one reads
it there. `ended.json` says that the run has ended, and why.
"""

import pathlib
import time

from impala_jax.launching import supervisor
from impala_jax.runtime import files


def record_path(run_dir: pathlib.Path, role: str, index: int) -> pathlib.Path:
  return run_dir / 'supervised' / f'{role}-{index}.json'


def end_run(run_dir: pathlib.Path, reason: str, cause: str = '') -> None:
  """Tells all supervisors; the first reason stands."""
  if not (run_dir / 'ended.json').exists():
    files.write_json(
      run_dir / 'ended.json', {'reason': reason, 'cause': cause, 'time': time.time()}
    )


def reset(run_dir: pathlib.Path) -> None:
  """Before a new launch: nothing has ended or failed; incarnations stay."""
  for name in ('ended.json', 'address.json'):
    (run_dir / name).unlink(missing_ok=True)
  for path in run_dir.glob('inference-*.json'):
    path.unlink(missing_ok=True)
  for path in (run_dir / 'supervised').glob('*.json'):
    incarnation = files.read_json(path).get('incarnation', -1)
    files.write_json(path, {'incarnation': incarnation})


def log_path(run_dir: pathlib.Path, role: str, index: int) -> pathlib.Path:
  return run_dir / 'logs' / f'{log_name(role, index)}.log'


log_name = supervisor.process_name
