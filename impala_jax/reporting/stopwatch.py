"""Wall time by stage."""

import time
from collections.abc import Iterable


class Stopwatch:
  """Splits wall time into named stages; what no stage claims is `other`."""

  def __init__(self, stages: Iterable[str]):
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
