"""What a process on a node of Slurm asks of Slurm."""

import os
import re
import subprocess
from collections.abc import Mapping


def address(node: str) -> str:
  """The address by which Slurm itself reaches a node."""
  text = _scontrol('show', 'node', '--oneliner', node)
  match = re.search(r'\bNodeAddr=(\S+)', text)
  return match.group(1) if match else node


def job(environment: Mapping[str, str]) -> str:
  """The name of this process's job alone.

  An array has the number of one of its tasks: by number Slurm would take all of them.
  """
  if array := environment.get('SLURM_ARRAY_JOB_ID'):
    return f'{array}_{environment["SLURM_ARRAY_TASK_ID"]}'
  return environment['SLURM_JOB_ID']


def requeue() -> None:
  """Has Slurm start this process's job anew."""
  _scontrol('requeue', job(os.environ))


def _scontrol(*arguments: str) -> str:
  return subprocess.run(
    ['scontrol', *arguments], capture_output=True, encoding='utf-8', errors='replace',
    check=True, timeout=60,
  ).stdout  # fmt: skip
