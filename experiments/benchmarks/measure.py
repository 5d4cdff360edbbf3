"""What benchmarks measure with: CPU-seconds and memory of process trees."""

import resource
import statistics
import threading
from collections.abc import Sequence
from typing import Any

import psutil


def peak_rss_mb() -> float:
  """Of this process, in MB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
  """Minimum, median and maximum."""
  return {
    'min': round(min(values), digits),
    'median': round(statistics.median(values), digits),
    'max': round(max(values), digits),
  }


class ProcessTree:
  """Watches a process and its descendants.

  Args:
    pid: the root.
    interval: seconds between looks at the memory.
  """

  def __init__(self, pid: int, interval: float = 1.0):
    self._root = psutil.Process(pid)
    self._stop = threading.Event()
    self._interval = interval
    self.peak_pss_mb = 0.0
    self.peak_rss_mb = 0.0  # Shared pages counted once in each process.
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def cpu_seconds(self) -> float:
    """User and system seconds so far of all that live, and of children they reaped."""
    total = 0.0
    for process in self._processes():
      try:
        times = process.cpu_times()
      except psutil.Error:
        continue
      total += times.user + times.system
      total += times.children_user + times.children_system
    return total

  def memory_mb(self) -> dict[str, float]:
    """PSS by process, in MB."""
    found = {}
    for process in self._processes():
      try:
        command = process.cmdline()
        name = command[-1].split('=')[0] if command else str(process.pid)
        found[f'{name} ({process.pid})'] = round(_pss(process) / 2**20, 1)
      except psutil.Error:
        continue
    return found

  def close(self) -> None:
    self._stop.set()
    self._thread.join(timeout=5)

  def _processes(self) -> list[psutil.Process]:
    try:
      return [self._root, *self._root.children(recursive=True)]
    except psutil.Error:
      return []

  def _watch(self) -> None:
    while not self._stop.wait(self._interval):
      pss = rss = 0.0
      for process in self._processes():
        try:
          pss += _pss(process)
          rss += process.memory_info().rss
        except psutil.Error:
          continue
      self.peak_pss_mb = max(self.peak_pss_mb, pss / 2**20)
      self.peak_rss_mb = max(self.peak_rss_mb, rss / 2**20)


def _pss(process: psutil.Process) -> float:
  info: Any = process.memory_full_info()
  return float(info.pss)
