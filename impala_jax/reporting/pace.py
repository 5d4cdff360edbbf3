"""How fast a run goes, over its newest updates."""

import collections

_LEAST = 4  # Updates that a figure is of.


class Pace:
  """Updates a second, from the times at which they begin.

  Over as few of the newest as there are in `interval` seconds, but at least four:
  an update may take longer than it is between two records.

  Args:
    interval: seconds.
  """

  def __init__(self, interval: float):
    self._interval = interval
    self._marks: collections.deque[tuple[float, int]] = collections.deque()

  @property
  def known(self) -> bool:
    """Whether there have been enough updates for a look ahead."""
    return len(self._marks) > _LEAST

  def note(self, updates: int, now: float) -> None:
    """One more update begins, after so many."""
    marks = self._marks
    marks.append((now, updates))
    while (
      len(marks) > _LEAST + 1
      and now - marks[1][0] >= self._interval
      and updates - marks[1][1] >= _LEAST
    ):
      marks.popleft()

  def idle(self, now: float) -> float:
    """Seconds since an update began; 0 before the first."""
    return now - self._marks[-1][0] if self._marks else 0.0

  def per_second(self, now: float) -> float | None:
    """None before the second update. An update that is overdue counts, too."""
    if len(self._marks) < 2:
      return None
    (start, first), (end, last) = self._marks[0], self._marks[-1]
    usual = (end - start) / (last - first)
    if now - end > 3 * usual:
      end = now
    return (last - first) / max(end - start, 1e-9)
