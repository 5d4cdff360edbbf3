"""How often what died may be started again, and how long to wait before."""

import collections
import time

WINDOW = 600.0  # Seconds in which deaths count.
_LONGEST_PAUSE = 30.0  # Seconds.


class RestartBudget:
  """Counts deaths: so many restarts within a window, with pauses that double.

  Args:
    max_restarts: within the window; one more death is one too many.
    window: seconds after which a death is forgotten.
    at_once: whether the first restart has no pause.

  Attributes:
    restarts: that were granted since the beginning, however long ago.
  """

  def __init__(self, max_restarts: int, window: float = WINDOW, at_once: bool = False):
    self.max_restarts = max_restarts
    self.restarts = 0
    self._window = window
    self._at_once = at_once
    self._deaths: collections.deque[float] = collections.deque()

  @property
  def deaths(self) -> int:
    """Within the window that ended with the last one."""
    return len(self._deaths)

  def spend(self, now: float | None = None) -> float | None:
    """Notes a death; seconds to wait before the restart, None where none is left.

    Args:
      now: by `time.monotonic`, which is asked where it is None.
    """
    now = time.monotonic() if now is None else now
    self._deaths.append(now)
    while now - self._deaths[0] > self._window:
      self._deaths.popleft()
    if len(self._deaths) > self.max_restarts:
      return None
    self.restarts += 1
    paused = len(self._deaths) - self._at_once
    return min(_LONGEST_PAUSE, 2.0 ** (paused - 1)) if paused else 0.0
