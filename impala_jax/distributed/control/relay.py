"""Reports of one learner's actors handed on to learner 0, which writes all metrics.

Under the names by which the actors reported: learner 0 sees them as if they had come to
it. The learner's own counts go along as those of role `learner`.
"""

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import Any

from impala_jax.distributed.control import board as control
from impala_jax.distributed.control import grpc as control_grpc
from impala_jax.distributed.transport import protocol as transport

_INTERVAL = 2.0  # Seconds.
_MOST_EVENTS = 10_000  # Kept while learner 0 is out of reach.


class RelayedControl(control.Control):
  """The control of a learner other than 0.

  Args:
    index: of this learner.
    incarnation: of its process.

  Attributes:
    lost_events: how many could not be kept for learner 0.
  """

  def __init__(self, index: int, incarnation: int):
    super().__init__()
    self._key = (index, incarnation)
    self._relay_lock = threading.Lock()
    self._reports: dict[tuple[str, int, int], dict[str, float]] = {}
    self._kept: collections.deque[dict[str, Any]] = collections.deque()
    self._client: control_grpc.Client | None = None
    self._stats: Callable[[], transport.ReaderStats] = transport.ReaderStats
    self._figures: dict[str, float] = {}
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

  def keep(self, record: dict[str, Any]) -> None:
    """Takes from a metrics record of this learner what learner 0 cannot know."""
    self._figures = {k: float(record[k]) for k in ('policy_lag_mean', 'policy_lag_max')}

  def report(
    self,
    role: str,
    index: int,
    incarnation: int,
    totals: dict[str, float],
    events: list[dict[str, Any]],
  ) -> bool:
    """See `Control`."""
    with self._relay_lock:
      self._reports[role, index, incarnation] = dict(totals)
      self._kept.extend(events)
      while len(self._kept) > _MOST_EVENTS:
        self._kept.popleft()
        self.lost_events += 1
    return super().report(role, index, incarnation, totals, events)

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
    totals = {
      **dataclasses.asdict(self._stats()),
      **self._figures,
      'parameter_fetches': float(self.fetches),
    }
    try:
      self._client.report('learner', *self._key, totals, events)
      events = []
      for key in list(reports):
        self._client.report(*key, reports[key], [])
        del reports[key]
    except transport.TransportError as e:
      logging.warning('learner 0 was not told: %s', e)
      with self._relay_lock:
        self._reports = {**reports, **self._reports}
        self._kept.extendleft(reversed(events))
