"""Who has joined an inference server, and which of its states are whose."""

import itertools
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SILENT = 300.0  # Seconds after which a client's room may be given to another.


class UnknownSession(Exception):
  """The client has not joined, has left, or its room was given to another."""


class NoRoom(Exception):
  """All states are in use; the text says how to have more."""


class Session:
  """One client and its states.

  Attributes:
    client: its name.
    slots: int32 [environments], rows of the states.
    heard: time.monotonic() of its last request.
    waiting: its request that was not answered yet.
  """

  def __init__(self, client: str, slots: np.ndarray):
    self.client = client
    self.slots = slots
    self.heard = time.monotonic()
    self.waiting: Any = None


class Sessions:
  """Not safe for threads.

  Args:
    capacity: how many states there are.
    on_end: called with each session that ends, before its states are another's.
  """

  def __init__(self, capacity: int, on_end: Callable[[Session], None]):
    self.capacity = capacity
    self._on_end = on_end
    self._sessions: dict[int, Session] = {}
    # Another server's numbers must mean nothing here.
    self._numbers = itertools.count(int.from_bytes(os.urandom(7), 'little'))
    self._free = list(range(capacity))
    self._new: list[np.ndarray] = []

  def __len__(self) -> int:
    return len(self._sessions)

  @property
  def environments(self) -> int:
    """Of all sessions."""
    return self.capacity - len(self._free)

  def get(self, number: int) -> Session:
    """Raises UnknownSession."""
    session = self._sessions.get(number)
    if session is None:
      raise UnknownSession('the states of this client are not here')
    return session

  def all(self) -> list[Session]:
    return list(self._sessions.values())

  def join(self, client: str, environments: int) -> int:
    """A new session's number; one that the client has already ends.

    Raises:
      NoRoom: see there.
      ValueError: `environments` is no number that could ever be had.
    """
    if not 1 <= environments <= self.capacity:
      raise ValueError(
        f'{environments} environments: this server has room for {self.capacity}, see '
        'inference.max_environments'
      )
    limit = time.monotonic() - SILENT
    for other, session in list(self._sessions.items()):
      if session.client == client:
        self.leave(other)
    for other, session in list(self._sessions.items()):
      if len(self._free) < environments and session.heard < limit:
        logging.info('%s has been silent: its states are freed', session.client)
        self.leave(other)
    if len(self._free) < environments:
      raise NoRoom(
        f'{environments} environments: {len(self._free)} of {self.capacity} states are '
        'free, see inference.max_environments'
      )
    slots = np.array([self._free.pop() for _ in range(environments)], np.int32)
    number = next(self._numbers)
    self._sessions[number] = Session(client, slots)
    self._new.append(slots)
    return number

  def leave(self, number: int) -> None:
    """Frees the states of a session; one that is not there is no error."""
    session = self._sessions.pop(number, None)
    if session is not None:
      self._free += session.slots.tolist()
      self._on_end(session)

  def take_new(self) -> list[np.ndarray]:
    """Rows of the states that were given out since the last call."""
    new, self._new = self._new, []
    return new
