"""Reports of one learner's actors handed on to learner 0, which writes all records.

Under the names by which the actors reported: learner 0 sees them as if they had come to
it. The learner's own counts go along as those of role `learner`.
"""

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping, Sequence

from impala_jax.distributed.control import board, protocol, wire
from impala_jax.distributed.control import grpc as control_grpc
from impala_jax.distributed.transport import protocol as transport

_INTERVAL = 2.0  # Seconds.
_MOST_EVENTS = 10_000  # Kept while learner 0 is out of reach.
_MOST_REPORTS = 10_000  # Likewise, of as many processes.
_GAUGES = ('queued', 'capacity')  # Of `ReaderStats`; the others are totals.


class Relay(board.Board):
  """The control of a learner other than 0.

  Args:
    levels: of the run.
    index: of this learner.
    incarnation: of its process.
    processes: see `protocol.Control`.

  Attributes:
    lost_events: how many could not be kept for learner 0.
  """

  def __init__(
    self,
    levels: Sequence[str],
    index: int,
    incarnation: int,
    processes: Mapping[protocol.Role, range] | None = None,
  ):
    super().__init__(levels, processes)
    self._key = (index, incarnation)
    self._relay_lock = threading.Lock()
    self._reports: dict[tuple[protocol.Role, int, int], protocol.Report] = {}
    self._kept: collections.deque[protocol.Event] = collections.deque()
    self._client: control_grpc.Client | None = None
    self._stats: Callable[[], transport.ReaderStats] = transport.ReaderStats
    self._gauges: Mapping[str, float] = {}
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._run, name='relay', daemon=True)
    self.lost_events = 0

  def relay(
    self, client: control_grpc.Client, stats: Callable[[], transport.ReaderStats]
  ) -> None:
    """Begins to hand on, every two seconds.

    Args:
      client: of learner 0; closed at the end.
      stats: of this learner's queue; called in a thread.
    """
    self._client, self._stats = client, stats
    self._thread.start()

  def keep(self, gauges: Mapping[str, float]) -> None:
    """Takes from a record of this learner what learner 0 cannot know."""
    self._gauges = gauges

  def report(self, report: protocol.Report) -> bool:
    with self._relay_lock:
      key = report.role, report.index, report.incarnation
      if key in self._reports or len(self._reports) < _MOST_REPORTS:
        self._reports[key] = dataclasses.replace(report, events=())
      self._kept.extend(report.events)
      while len(self._kept) > _MOST_EVENTS:
        self._kept.popleft()
        self.lost_events += 1
    return super().report(report)

  def end_relay(self) -> None:
    """Hands on what is left. Bounded in time; idempotent."""
    if self._client is None or self._ended.is_set():
      return
    self._ended.set()
    self._thread.join(30.0)
    if not self._thread.is_alive():
      self._hand_on()
    self._client.close()

  def _run(self) -> None:
    while not self._ended.wait(_INTERVAL):
      self._hand_on()

  def _hand_on(self) -> None:
    assert self._client is not None
    with self._relay_lock:
      reports, self._reports = self._reports, {}
      events = list(self._kept)
      self._kept.clear()
    totals = dataclasses.asdict(self._stats())
    gauges = {name: totals.pop(name) for name in _GAUGES}
    totals |= {
      'parameter_fetches': self.fetches,
      'reports_refused': self.refusals.total,
    }
    own = protocol.Report('learner', *self._key, totals, {**gauges, **self._gauges})
    try:
      told = False
      while events or not told:
        part = events[: wire.MOST_EVENTS]
        self._client.report(dataclasses.replace(own, events=part))
        told, events = True, events[len(part) :]
      for key in list(reports):
        self._client.report(reports[key])
        del reports[key]
    except transport.TransportError as e:
      logging.warning('learner 0 was not told: %s', e)
      with self._relay_lock:
        self._reports = {**reports, **self._reports}
        self._kept.extendleft(reversed(events))
