"""What the process of a role is told by environment variables, on every launcher.

So the command of a role is the same everywhere. The variables are written and read here
alone.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class RoleEnvironment:
  """Which process of which run this is; `read` judges every variable.

  Attributes:
    run_dir: IMPALA_RUN_DIR, of the run.
    index: IMPALA_INDEX, of this process within its role.
    count: IMPALA_COUNT, learner processes of the run.
    incarnation: IMPALA_INCARNATION, grows with each start of this process.
    parent: IMPALA_PARENT, a process id; when it is gone, so is the reason to run.
      0: there is none.
    host: IMPALA_HOST, by which other machines of the run reach this one; empty where
      there are none.
    control_port: IMPALA_CONTROL_PORT, TCP port of the learner's control; 0 for any.
    queue_port: IMPALA_QUEUE_PORT, TCP port of its queue; 0 for any.
    inference_port: IMPALA_INFERENCE_PORT, TCP port of an inference server; 0 for any.
    patience: IMPALA_PATIENCE, seconds that a client waits for a learner; None where
      nobody starts learners again.
  """

  run_dir: pathlib.Path = pathlib.Path()
  index: int = 0
  count: int = 1
  incarnation: int = 0
  parent: int = 0
  host: str = ''
  control_port: int = 0
  queue_port: int = 0
  inference_port: int = 0
  patience: float | None = None

  @classmethod
  def read(cls, variables: Mapping[str, str] = os.environ) -> 'RoleEnvironment':
    """Raises ValueError, which names the variable that is out of range."""
    count = _number(variables, 'IMPALA_COUNT', 1, 2**16, default=1)
    return cls(
      run_dir=pathlib.Path(variables.get('IMPALA_RUN_DIR', '')),
      # Only the learners' indices have an end: actors come and go.
      index=_number(variables, 'IMPALA_INDEX', 0, 2**31),
      count=count,
      incarnation=_number(variables, 'IMPALA_INCARNATION', 0, 2**31),
      parent=_number(variables, 'IMPALA_PARENT', 0, 2**31),
      host=variables.get('IMPALA_HOST', ''),
      control_port=_number(variables, 'IMPALA_CONTROL_PORT', 0, 2**16),
      queue_port=_number(variables, 'IMPALA_QUEUE_PORT', 0, 2**16),
      inference_port=_number(variables, 'IMPALA_INFERENCE_PORT', 0, 2**16),
      patience=_seconds(variables, 'IMPALA_PATIENCE'),
    )


def variables(**fields: Any) -> dict[str, str]:
  """The variables of some fields of `RoleEnvironment`, by the fields' names."""
  known = {f.name for f in dataclasses.fields(RoleEnvironment)}
  if unknown := fields.keys() - known:
    raise TypeError(f'no such fields: {sorted(unknown)}')
  return {f'IMPALA_{name.upper()}': str(value) for name, value in fields.items()}


def forget() -> None:
  """Has this process, and all that it starts, know of no role.

  It may have been started from within one, such as by a shell in a pod of another run.
  """
  for name in variables(**vars(RoleEnvironment())):
    os.environ.pop(name, None)


def _number(
  variables: Mapping[str, str], name: str, low: int, end: int, default: int = 0
) -> int:
  text = variables.get(name) or str(default)
  if not (text.isascii() and text.isdecimal()) or not low <= int(text) < end:
    raise ValueError(f'{name} is {text!r}: must lie in [{low}, {end})')
  return int(text)


def _seconds(variables: Mapping[str, str], name: str) -> float | None:
  text = variables.get(name, '')
  if not text:
    return None
  try:
    seconds = float(text)
  except ValueError:
    seconds = math.nan
  if not 0 < seconds < math.inf:
    raise ValueError(f'{name} is {text!r}: must be a number of seconds')
  return seconds
