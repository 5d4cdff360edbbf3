"""The learner's side of the control, in its process."""

import collections
import dataclasses
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence

from impala_jax import types
from impala_jax.distributed.control import protocol
from impala_jax.runtime import refusals

_MOST_OTHERS = 4096  # Processes beyond those that the run is known to have.
_SILENT = 60.0  # Seconds after which one of these makes room for another.
_MOST_INCARNATIONS = 4  # Of one process, whose totals are told apart.
_MOST_NAMES = 1000  # Of totals.
_MOST_EVENTS = 100_000  # That wait for the learner to look at them.


class Board:
  """See `protocol.Control`; threads of this process are its clients without more ado.

  Args:
    levels: of the run.
    processes: see `protocol.Control`.
  """

  def __init__(
    self,
    levels: Sequence[str] = (),
    processes: Mapping[protocol.Role, range] | None = None,
  ) -> None:
    self.identity = uuid.uuid4().hex
    self.levels = levels
    self.processes = processes or {}
    self.fetches = 0
    self.refusals = refusals.Refusals('reports or parts of such')
    self._lock = threading.Lock()
    self._host_lock = threading.Lock()
    self._published: tuple[int, Callable[[], types.Nest]] = (-1, lambda: None)
    self._host: tuple[int, types.Nest] = (-1, None)
    self._peers: dict[tuple[protocol.Role, int], _Process] = {}
    # Of these the ones that nobody knew of before, longest silent first.
    self._others: collections.OrderedDict[tuple[protocol.Role, int], None]
    self._others = collections.OrderedDict()
    self._totals: dict[tuple[protocol.Role, str], float] = {}
    self._events: list[protocol.Event] = []
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
    now = time.monotonic()
    with self._lock:
      process = self._process(report, now)
      if process is None:
        who, why = 'unknown processes', f'{_MOST_OTHERS} others have reported'
      else:
        who = f'{report.role} {report.index}'
        why = self._take(process, report, now)
    if why:
      self.refusals.add(who, why)
    return not self._stop.is_set()

  def drain_events(self) -> list[protocol.Event]:
    with self._lock:
      events, self._events = self._events, []
    return events

  def peers(self) -> list[protocol.Peer]:
    with self._lock:
      return [process.newest for process in self._peers.values()]

  def total(self, role: protocol.Role, name: str) -> float:
    with self._lock:
      return self._totals.get((role, name), 0.0)

  # --- with the lock held ---

  def _process(self, report: protocol.Report, now: float) -> '_Process | None':
    """Whose report it is; None where there is no room for another stranger."""
    key = report.role, report.index
    process = self._peers.get(key)
    known = report.index in self.processes.get(report.role, ())
    if process is None:
      if not known and len(self._others) >= _MOST_OTHERS:
        first = next(iter(self._others))
        if now - self._peers[first].newest.heard < _SILENT:
          return None
        del self._others[first], self._peers[first]
      process = self._peers[key] = _Process()
    if not known:
      self._others[key] = None
      self._others.move_to_end(key)
    return process

  def _take(self, process: '_Process', report: protocol.Report, now: float) -> str:
    """Adds a report up; returns why a part of it was not."""
    why = ''
    before = process.counted.get(report.incarnation, {})
    for name, value in report.totals.items():
      key = report.role, name
      if key not in self._totals and len(self._totals) >= _MOST_NAMES:
        why = f'total {name!r:.40}: {_MOST_NAMES} others have been named'
        continue
      change = value - before.get(name, 0.0)
      self._totals[key] = self._totals.get(key, 0.0) + change
    process.take(report, now)
    room = _MOST_EVENTS - len(self._events)
    self._events.extend(report.events[:room])
    if len(report.events) > room:
      why = f'{len(report.events) - room} events: {_MOST_EVENTS} wait already'
    return why


class _Process:
  """What one process has said of itself."""

  newest: protocol.Peer

  def __init__(self) -> None:
    # Totals by incarnation, the newest heard last. Late words of one that has gone
    # are told from those of its successor.
    self.counted: dict[int, Mapping[str, float]] = {}

  def take(self, report: protocol.Report, now: float) -> None:
    self.newest = protocol.Peer(dataclasses.replace(report, events=()), now)
    self.counted.pop(report.incarnation, None)
    self.counted[report.incarnation] = report.totals
    if len(self.counted) > _MOST_INCARNATIONS:
      del self.counted[next(iter(self.counted))]
