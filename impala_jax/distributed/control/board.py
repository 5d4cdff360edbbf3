"""What the learner process tells the others: parameters, and when to stop.

And what they tell it: their counts and episode returns. One object in the learner
process; `control_grpc` serves it to other processes. Every report carries totals,
so that a lost one loses nothing.
"""

import dataclasses
import threading
import time
import uuid
from typing import Any

import numpy as np

from impala_jax import types
from impala_jax.distributed.transport import protocol as transport
from impala_jax.learning import learner


@dataclasses.dataclass
class Peer:
  """The newest report of one process or thread of the run."""

  role: str
  index: int
  incarnation: int
  totals: dict[str, float]
  heard: float  # time.monotonic() of the last report.


class Control:
  """Shared by the learner (which publishes) and its clients. Thread-safe.

  Attributes:
    identity: another one each time that a learner starts. Versions of different
      learners do not compare: one that came back from a checkpoint begins lower.
  """

  def __init__(self) -> None:
    self.identity = uuid.uuid4().hex
    self._lock = threading.Lock()
    self._host_lock = threading.Lock()
    self._version = -1
    self._device_params: types.Nest = None
    self._host: tuple[int, types.Nest] = (-1, None)
    self._peers: dict[tuple[str, int], Peer] = {}
    self._past: dict[str, float] = {}
    self._events: list[dict[str, Any]] = []
    self._stop = threading.Event()
    self.fetches = 0

  # --- the learner's side ---

  def publish(self, version: int, params: types.Nest) -> None:
    """Offers replicated `params`; they are copied off the device when asked for."""
    with self._lock:
      self._version, self._device_params = version, params

  def stop(self) -> None:
    self._stop.set()

  def drain_events(self) -> list[dict[str, Any]]:
    """Events reported since the last call, oldest first."""
    with self._lock:
      events, self._events = self._events, []
    return events

  def peers(self) -> list[Peer]:
    with self._lock:
      return [dataclasses.replace(p, totals=dict(p.totals)) for p in
              self._peers.values()]  # fmt: skip

  def total(self, role: str, name: str) -> float:
    """Sum of one count over all processes of a role, those replaced included."""
    with self._lock:
      return self._past.get(f'{role}/{name}', 0.0) + sum(
        p.totals.get(name, 0.0) for p in self._peers.values() if p.role == role
      )

  # --- the clients' side ---

  def fetch(
    self, have_version: int, of: str | None = None
  ) -> tuple[int, types.Nest] | None:
    """The newest (version, NumPy parameters), or None if nothing newer is there.

    Args:
      have_version: what the client has; -1 for nothing.
      of: `identity` of the learner that `have_version` is of; None for this one.
    """
    if of is not None and of != self.identity:
      have_version = -1
    with self._lock:
      version, params = self._version, self._device_params
    if version <= have_version:
      return None
    # One copy from the device per version, however many ask for it.
    with self._host_lock:
      if self._host[0] < version:
        self._host = (version, learner.to_host(params))
      self.fetches += 1
      return self._host

  def report(
    self,
    role: str,
    index: int,
    incarnation: int,
    totals: dict[str, float],
    events: list[dict[str, Any]],
  ) -> bool:
    """Takes a report; returns whether the run goes on.

    Args:
      role: 'actor' or 'evaluator'.
      index: of the process within its role.
      incarnation: changes when the process restarts.
      totals: counts since that process started; they only grow.
      events: things to log once (episodes, evaluations).
    """
    with self._lock:
      before = self._peers.get((role, index))
      if before is not None and before.incarnation != incarnation:
        for name, value in before.totals.items():
          key = f'{role}/{name}'
          self._past[key] = self._past.get(key, 0.0) + value
      self._peers[role, index] = Peer(
        role, index, incarnation, dict(totals), time.monotonic()
      )
      self._events.extend(events)
    return not self._stop.is_set()

  @property
  def stopping(self) -> bool:
    return self._stop.is_set()


class Reporter:
  """A client's habit of reporting about every `interval` seconds.

  Args:
    control: a `Control`, or the gRPC client with the same methods.
    role: 'actor' or 'evaluator'.
    index: of this process within its role.
    incarnation: of this process.
    interval: seconds between reports.
  """

  def __init__(
    self, control: Any, role: str, index: int, incarnation: int, interval: float = 2.0
  ):
    self._control = control
    self._key = (role, index, incarnation)
    self._interval = interval
    self._next = 0.0
    self._events: list[dict[str, Any]] = []
    self._lost_at: float | None = None

  @property
  def unheard(self) -> float:
    """Seconds since the first of the reports in a row that failed; 0 if none did."""
    return 0.0 if self._lost_at is None else time.monotonic() - self._lost_at

  def add(self, event: dict[str, Any]) -> None:
    self._events.append(event)

  def maybe_report(self, totals: dict[str, float], force: bool = False) -> bool:
    """Reports if it is time; returns whether the run goes on.

    Raises:
      transport.TransportError: the learner is out of reach; the events are kept.
    """
    now = time.monotonic()
    if now < self._next and not force:
      return True
    self._next = now + self._interval
    plain = {k: float(np.asarray(v)) for k, v in totals.items()}
    try:
      go_on = self._control.report(*self._key, plain, self._events)
    except transport.TransportError:
      self._lost_at = self._lost_at or now
      raise
    self._events = []
    self._lost_at = None
    return go_on
