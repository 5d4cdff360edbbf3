"""Processes that answer lines of input with lines of JSON."""

import json
import os
import subprocess
from typing import Any, Self


class Child:
  """One of them, as a context; killed at its end.

  Args:
    command: that starts it.
    env: added to this process's environment.
  """

  def __init__(self, command: list[str], **env: str):
    self._name = ' '.join(command[:3])
    self._process = subprocess.Popen(
      command,
      env={**os.environ, **env},
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )
    self.pid = self._process.pid

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self._process.kill()
    self._process.communicate()

  def tell(self) -> None:
    """Sends an empty line."""
    assert self._process.stdin is not None
    self._process.stdin.write('\n')
    self._process.stdin.flush()

  def hear(self) -> dict[str, Any]:
    """Waits for its next line.

    Raises:
      SystemExit: it has ended.
    """
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise SystemExit(f'error: {self._name} ended: see above')
    return json.loads(line)

  def ask(self) -> dict[str, Any]:
    """The answer to an empty line."""
    self.tell()
    return self.hear()
