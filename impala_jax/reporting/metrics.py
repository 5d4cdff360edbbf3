"""Where a run's figures go: JSON lines, TensorBoard and the status file."""

import collections
import json
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from impala_jax import config as config_lib
from impala_jax.environments import registry
from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory


class MetricsWriter:
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

  def write(self, record: dict[str, Any], **status: Any) -> None:
    """One record of flat numbers; `status` goes to the status file besides."""
    record = {k: _plain(v) for k, v in record.items()}
    self._lines.write(json.dumps(record) + '\n')
    if self._board is not None:
      for name, value in record.items():
        if isinstance(value, int | float) and name not in ('frames', 'time'):
          self._board.add_scalar(name, value, record['frames'])
    files.write_json(self._status, {**record, **status})

  def close(self) -> None:
    self._lines.close()
    if self._board is not None:
      self._board.close()


class EpisodeLog:
  """Returns of finished episodes by level, over a sliding window.

  Args:
    levels: of the run.
    window: the newest so many episodes of each level count, however often others
      end: scores of suites are means over levels of such means.
  """

  def __init__(self, levels: Sequence[str], window: int = 100):
    self._levels = tuple(levels)
    self._recent = [
      collections.deque[tuple[float, float]](maxlen=window) for _ in levels
    ]
    self.count = 0

  def add(self, task_id: int, episode_return: float, length: float) -> None:
    self._recent[task_id].append((episode_return, length))
    self.count += 1

  def means(self) -> dict[str, float]:
    """Mean return over the window, of each level with an episode that ended."""
    return {
      level: float(np.mean([r for r, _ in recent]))
      for level, recent in zip(self._levels, self._recent, strict=True)
      if recent
    }

  def summary(self) -> dict[str, float]:
    """Mean return and length (agent steps) over the window; by level if several."""
    means = [np.mean(r, axis=0) for r in self._recent if r]
    if not means:
      return {}
    out = {
      'episode_return': float(np.mean([m[0] for m in means])),
      'episode_length': float(np.mean([m[1] for m in means])),
    }
    if len(self._levels) > 1:
      out |= {f'episode_return/{level}': mean for level, mean in self.means().items()}
    return out


def suite_scores(
  config: config_lib.Config, mean_returns: Mapping[str, float]
) -> dict[str, float]:
  """Figures of the whole suite; empty where it has none, or for one's own levels."""
  try:
    return registry.scores(config, mean_returns)
  except config_lib.ConfigError:  # An environment that was handed over, not named.
    return {}


class Stopwatch:
  """Splits wall time into named stages; what no stage claims is `other`."""

  def __init__(self, stages: Sequence[str]):
    self._stages = tuple(stages)
    self.seconds = dict.fromkeys(self._stages, 0.0)
    self._mark = time.perf_counter()
    self._lap = self._mark
    self._lap_seconds = dict(self.seconds)

  def charge(self, stage: str) -> None:
    """Charges the time since the last charge to `stage`."""
    now = time.perf_counter()
    self.seconds[stage] += now - self._mark
    self._mark = now

  def shares(self) -> dict[str, float]:
    """Fractions of wall time by stage since the last call; they add up to 1."""
    now = time.perf_counter()
    wall = max(now - self._lap, 1e-9)
    out = {s: (self.seconds[s] - self._lap_seconds[s]) / wall for s in self._stages}
    out['other'] = max(0.0, 1.0 - sum(out.values()))
    self._lap, self._lap_seconds = now, dict(self.seconds)
    return out


def _plain(value: Any) -> Any:
  if isinstance(value, str | int | bool | None):
    return value
  number = float(value)
  # JSON has no NaN; null keeps the line readable everywhere.
  return number if math.isfinite(number) else None
