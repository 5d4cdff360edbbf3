"""A client's habit of reporting."""

import time
from collections.abc import Mapping

from impala_jax.distributed.control import protocol, wire
from impala_jax.distributed.transport import protocol as transport


class Reporter:
  """Reports about every `interval` seconds.

  Args:
    control: the learner's, or a way to it.
    role: of this process.
    index: within its role.
    incarnation: of this process.
    interval: seconds between reports.
  """

  def __init__(
    self,
    control: protocol.Client,
    role: protocol.Role,
    index: int,
    incarnation: int,
    interval: float = 2.0,
  ):
    self._control = control
    self._who = (role, index, incarnation)
    self._interval = interval
    self._next = 0.0
    self._events: list[protocol.Event] = []
    self._lost_at: float | None = None

  @property
  def unheard(self) -> float:
    """Seconds since the first of the reports in a row that failed; 0 if none did."""
    return 0.0 if self._lost_at is None else time.monotonic() - self._lost_at

  @property
  def due(self) -> bool:
    """Whether `maybe_report` would report now."""
    return time.monotonic() >= self._next

  def add(self, event: protocol.Event) -> None:
    self._events.append(event)

  def maybe_report(
    self,
    totals: Mapping[str, float],
    gauges: Mapping[str, float] | None = None,
    left: bool = False,
  ) -> bool:
    """Reports if it is time, or the last one; returns whether the run goes on.

    Raises:
      transport.TransportError: the learner is out of reach; the events are kept.
    """
    now = time.monotonic()
    if now < self._next and not left:
      return True
    self._next = now + self._interval
    numbers = _plain(totals), _plain(gauges or {})
    go_on = True
    while go_on:
      events = tuple(self._events[: wire.MOST_EVENTS])
      last = len(events) == len(self._events)
      report = protocol.Report(*self._who, *numbers, events, left and last)
      try:
        go_on = self._control.report(report)
      except transport.TransportError:
        self._lost_at = self._lost_at or now
        raise
      del self._events[: len(events)]
      if last:
        break
    self._lost_at = None
    return go_on


def _plain(numbers: Mapping[str, float]) -> dict[str, float]:
  """Python's own numbers, which msgpack can hold."""
  return {name: float(value) for name, value in numbers.items()}
