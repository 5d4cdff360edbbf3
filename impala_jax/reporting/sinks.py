"""Where a run's records go: JSON lines, TensorBoard and the status file."""

import contextlib
import json
import logging
import math
import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any

from impala_jax.reporting import record
from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory


class RecordWriter:
  """Appends records to `metrics.jsonl`, to TensorBoard, and to `status.json`.

  A run that goes on from a checkpoint has forgotten what came after that: it is cut off
  the files of records and evaluations, and TensorBoard is told to drop it.

  Args:
    run_dir: the run directory.
    checkpoint: metadata of the one that the run goes on from; empty for none.
    tensorboard: whether to write event files (needs tensorboardX).
    check: called before each record; raises where this process must not write any more.

  Attributes:
    last: the last line that was kept; empty where there is none.
  """

  def __init__(
    self,
    run_dir: pathlib.Path,
    checkpoint: Mapping[str, Any] = types.MappingProxyType({}),
    tensorboard: bool = True,
    check: Callable[[], None] = lambda: None,
  ):
    updates = checkpoint.get('updates', 0)
    run_dir.mkdir(parents=True, exist_ok=True)
    run = RunDirectory(run_dir)
    self.last = files.cut_json_lines(
      run.metrics, run.cut(run.metrics), _after('updates', updates)
    )
    cut_evaluations(run, updates)
    self._status = run.status
    self._check = check
    self._lines = open(run.metrics, 'a', buffering=1)  # noqa: SIM115
    self._board: Any = None
    if tensorboard:
      import tensorboardX

      # What was written at a step of this or a later one is dropped.
      purge = checkpoint.get('frames', 0) + 1 if run.tensorboard.exists() else None
      self._board = tensorboardX.SummaryWriter(str(run.tensorboard), purge_step=purge)

  def write(self, status: record.Status, line: bool = True) -> None:
    """A line of the record alone; the status file has the rest besides.

    Args:
      status: of now.
      line: its record is a new one. Otherwise only the status file is written.
    """
    self._check()
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


def cut_evaluations(run: RunDirectory, updates: int) -> None:
  """Cuts off evaluations of later parameters, which a run that went back has not."""
  path = run.evaluations
  files.cut_json_lines(path, run.cut(path), _after('version', updates))


def _after(name: str, updates: int) -> Callable[[dict[str, Any]], bool]:
  return lambda record: isinstance(x := record.get(name), int) and x > updates


def _is_written(board: Any) -> bool:
  """Whether the thread that writes event files lives.

  On a full disk it dies; then all that is asked of the writer would wait for ever.
  """
  return bool(board.file_writer.event_writer._worker.is_alive())
