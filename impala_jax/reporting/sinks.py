"""Where a run's records go: JSON lines, TensorBoard and the status file."""

import contextlib
import json
import logging
import math
import pathlib
from typing import Any

from impala_jax.reporting import record
from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory


class RecordWriter:
  """Appends records to `metrics.jsonl`, to TensorBoard, and to `status.json`.

  Args:
    run_dir: the run directory.
    tensorboard: whether to write event files (needs tensorboardX).
  """

  def __init__(self, run_dir: pathlib.Path, tensorboard: bool = True):
    run_dir.mkdir(parents=True, exist_ok=True)
    run = RunDirectory(run_dir)
    self._status = run.status
    self._lines = open(run.metrics, 'a', buffering=1)  # noqa: SIM115
    self._board: Any = None
    if tensorboard:
      import tensorboardX

      self._board = tensorboardX.SummaryWriter(str(run.tensorboard))

  def write(self, status: record.Status, line: bool = True) -> None:
    """A line of the record alone; the status file has the rest besides.

    Args:
      status: of now.
      line: its record is a new one. Otherwise only the status file is written.
    """
    # JSON has no NaN; null keeps the line readable everywhere.
    plain = {
      key: value if math.isfinite(value) else None
      for key, value in status.record.flat().items()
    }
    if line:
      self._append(plain)
    files.write_json(self._status, {**plain, **status.besides()})

  def _append(self, plain: dict[str, Any]) -> None:
    with files.naming(self._lines.name):
      self._lines.write(json.dumps(plain) + '\n')
    if self._board is not None and not _is_written(self._board):
      self._board = None
      logging.warning('TensorBoard has no more from here: its files cannot be written')
    if self._board is not None:
      for name, value in plain.items():
        if value is not None and name not in ('frames', 'time'):
          self._board.add_scalar(name, value, plain['frames'])

  def close(self) -> None:
    self._lines.close()
    if self._board is not None and _is_written(self._board):
      with contextlib.suppress(OSError):  # It is an extra.
        self._board.close()


def _is_written(board: Any) -> bool:
  """Whether the thread that writes event files lives.

  On a full disk it dies; then all that is asked of the writer would wait for ever.
  """
  return bool(board.file_writer.event_writer._worker.is_alive())
