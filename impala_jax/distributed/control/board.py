"""The learner's side of the control, in its process."""

import dataclasses
import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence

from impala_jax import types
from impala_jax.distributed.control import protocol

_REMARK = 60.0  # Seconds, at least, between two remarks on what was refused.


class Board:
  """See `protocol.Control`; threads of this process are its clients without more ado.

  Args:
    levels: of the run.
  """

  def __init__(self, levels: Sequence[str] = ()) -> None:
    self.identity = uuid.uuid4().hex
    self.levels = levels
    self.fetches = self.refused = 0
    self._lock = threading.Lock()
    self._host_lock = threading.Lock()
    self._published: tuple[int, Callable[[], types.Nest]] = (-1, lambda: None)
    self._host: tuple[int, types.Nest] = (-1, None)
    self._peers: dict[tuple[protocol.Role, int], protocol.Peer] = {}
    self._past: dict[tuple[protocol.Role, str], float] = {}
    self._events: list[protocol.Event] = []
    self._next_remark = 0.0
    self._stop = threading.Event()

  def publish(self, version: int, copy: Callable[[], types.Nest]) -> None:
    with self._lock:
      self._published = version, copy

  def stop(self) -> None:
    self._stop.set()

  def fetch(
    self, have_version: int, of: str | None = None
  ) -> tuple[int, types.Nest] | None:
    if of is not None and of != self.identity:
      have_version = -1
    with self._lock:
      version, copy = self._published
    if version <= have_version:
      return None
    # One copy from the device per version, however many ask for it.
    with self._host_lock:
      if self._host[0] < version:
        self._host = version, copy()
      self.fetches += 1
      return self._host

  def report(self, report: protocol.Report) -> bool:
    key = report.role, report.index
    with self._lock:
      before = self._peers.get(key)
      if before is not None and before.report.incarnation != report.incarnation:
        for name, value in before.report.totals.items():
          past = report.role, name
          self._past[past] = self._past.get(past, 0.0) + value
      self._peers[key] = protocol.Peer(
        dataclasses.replace(report, events=()), time.monotonic()
      )
      self._events.extend(report.events)
    return not self._stop.is_set()

  def refuse(self, why: str) -> None:
    now = time.monotonic()
    with self._lock:
      self.refused += 1
      if now < self._next_remark:
        return
      self._next_remark = now + _REMARK
    logging.warning('refused %d reports or parts of such so far: %s', self.refused, why)

  def drain_events(self) -> list[protocol.Event]:
    with self._lock:
      events, self._events = self._events, []
    return events

  def peers(self) -> list[protocol.Peer]:
    with self._lock:
      return list(self._peers.values())

  def total(self, role: protocol.Role, name: str) -> float:
    with self._lock:
      return self._past.get((role, name), 0.0) + sum(
        p.report.totals.get(name, 0.0)
        for p in self._peers.values()
        if p.report.role == role
      )
