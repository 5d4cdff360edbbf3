"""How learner 0 and the other learners of a run meet, and their connections (TCP).

Learner 0 listens on a port of its own choice and writes where to `gang.json` of the run
directory; the others read it until they get through. The token in it tells one start of
the gang from another, and learners from strangers: before it was shown, what comes is
compared, not decoded, and nobody is waited for.
"""

import contextlib
import json
import pathlib
import secrets
import select
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

from impala_jax.distributed.security import ports
from impala_jax.runtime import files, refusals
from impala_jax.runtime.run_directory import RunDirectory

_MEET_TIMEOUT = 300.0  # Seconds from the first learner to the last.
_SLICE = 0.2
_ANSWER = 5.0
_LONGEST = 2**16  # Bytes of one message.
_LONGEST_HELLO = 256  # Likewise, of the first one.
_MOST_KNOCKING = 64  # Connections that have not shown the token.


class GangError(RuntimeError):
  """Another learner is gone, hangs, or never came; the text says which."""


class Connection:
  """Short messages (lists that JSON can hold) to and from one other learner.

  Args:
    connection: made; owned from here on.
    name: of the other side, for people.

  Attributes:
    heard: time.monotonic() of the newest message.
  """

  def __init__(self, connection: socket.socket, name: str):
    connection.settimeout(_ANSWER)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    self._connection = connection
    self._received = b''
    self.name = name
    self.heard = time.monotonic()

  def fileno(self) -> int:
    return self._connection.fileno()

  def send(self, *message: Any) -> None:
    """Raises GangError where the other side is gone or takes nothing in."""
    try:
      self._connection.sendall(json.dumps(message).encode() + b'\n')
    except OSError as e:
      raise GangError(f'{self.name} has left: {e}') from e

  def receive(self, timeout: float = 0.0) -> list[Any] | None:
    """The next message, or None if there is none within `timeout` seconds.

    Raises:
      GangError: the other side is gone, or sends what is no message.
    """
    deadline = time.monotonic() + timeout
    while b'\n' not in self._received:
      left = max(0.0, deadline - time.monotonic())
      if not select.select([self], [], [], left)[0]:
        return None
      try:
        data = self._connection.recv(4096)
      except OSError as e:
        raise GangError(f'{self.name} has left: {e}') from e
      if not data or len(self._received) > _LONGEST:
        raise GangError(f'{self.name} has left')
      self._received += data
    text, _, self._received = self._received.partition(b'\n')
    self.heard = time.monotonic()
    try:
      message = json.loads(text)
    except (ValueError, RecursionError) as e:
      raise GangError(f'{self.name} sent what is no message') from e
    return message if isinstance(message, list) and message else ['']

  def close(self) -> None:
    self._connection.close()


def receive_from_others(
  run_dir: pathlib.Path, host: str, count: int, should_stop: Callable[[], bool]
) -> dict[int, Connection] | None:
  """Learner 0: waits for all others.

  Args:
    run_dir: of the run, seen by all learners.
    host: name by which other machines reach this one; empty: one machine, loopback.
    count: learners of the run.
    should_stop: asked while waiting.

  Returns:
    A connection to each by its index, or None if told to stop before.

  Raises:
    GangError: some did not come in time.
  """
  token = secrets.token_hex(16)
  deadline = time.monotonic() + _MEET_TIMEOUT
  with (
    ports.listen('' if host else ports.LOOPBACK, backlog=1024) as listener,
    _Door(listener, token, count) as door,
  ):
    place = {'host': host or ports.LOOPBACK, 'port': listener.getsockname()[1]}
    files.write_json(RunDirectory(run_dir).gang, {**place, 'token': token}, secret=True)
    # A second look finds those who have gone while the last one came.
    while not (door.complete and door.look(0.0) and door.complete):
      if should_stop():
        return None
      if time.monotonic() > deadline:
        missing = ', '.join(str(i) for i in range(1, count) if i not in door.here)
        raise GangError(
          f'learners {missing} of {count} did not come within {_MEET_TIMEOUT:.0f} s'
        )
      door.look(_SLICE)
    connections = door.take()
  for connection in connections.values():
    connection.send('complete')
  return connections


def reach_first(
  run_dir: pathlib.Path, index: int, should_stop: Callable[[], bool]
) -> Connection | None:
  """The other learners: a connection to learner 0 once all are there.

  None if told to stop before.

  Raises:
    GangError: learner 0 did not answer in time, or has left meanwhile.
  """
  deadline = time.monotonic() + _MEET_TIMEOUT
  why = ''
  while not should_stop():
    if time.monotonic() > deadline:
      raise GangError(f'learner 0 did not answer within {_MEET_TIMEOUT:.0f} s: {why}')
    try:
      place = json.loads(RunDirectory(run_dir).gang.read_text())
      address = (str(place['host']), int(place['port']))
      connection = Connection(
        socket.create_connection(address, timeout=_ANSWER), 'learner 0'
      )
      connection.send('hello', place['token'], index)
      if connection.receive(_ANSWER) == ['welcome']:
        break
      why = f'what listens at {address} is not learner 0'
      connection.close()
    except (OSError, ValueError, KeyError, TypeError, OverflowError, GangError) as e:
      why = str(e)
    time.sleep(_SLICE)
  # Learner 0 gives up first where others do not come.
  deadline = time.monotonic() + _MEET_TIMEOUT + _ANSWER
  while not should_stop():
    if connection.receive(_SLICE) == ['complete']:
      return connection
    if time.monotonic() > deadline:
      raise GangError('learner 0 still waits for others')
  return None


class _Door:
  """Where the others come in to learner 0, one look at a time.

  Args:
    listener: that they connect to.
    token: that they must show.
    count: learners of the run.

  Attributes:
    here: those who have shown it, by their index.
  """

  def __init__(self, listener: socket.socket, token: str, count: int):
    self.here: dict[int, Connection] = {}
    self._count = count
    self._hello = f'["hello", "{token}", '.encode()
    self._knocking: dict[socket.socket, tuple[bytes, float]] = {}  # Said; until when.
    self._refusals = refusals.Refusals('connections to learner 0')
    self._selector = selectors.DefaultSelector()
    listener.setblocking(False)
    self._listener = listener
    self._selector.register(listener, selectors.EVENT_READ)

  def __enter__(self) -> '_Door':
    return self

  def __exit__(self, *_: object) -> None:
    self._selector.close()
    for stranger in self._knocking:
      stranger.close()
    for connection in self.here.values():
      connection.close()

  @property
  def complete(self) -> bool:
    return len(self.here) == self._count - 1

  def take(self) -> dict[int, Connection]:
    """Those who are here, from now on the caller's."""
    taken, self.here = self.here, {}
    return taken

  def look(self, timeout: float) -> bool:
    """Attends to all who have come or said something within `timeout` seconds."""
    for key, _ in self._selector.select(timeout):
      if key.fileobj is self._listener:
        self._open()
      elif isinstance(key.fileobj, socket.socket):
        self._hear(key.fileobj)
      elif self.here.get(key.data) is key.fileobj:
        # It has gone: learners say nothing more before all are here.
        self._forget(key.data)
    now = time.monotonic()
    for stranger, (_, until) in list(self._knocking.items()):
      if now > until:
        self._refuse(stranger, f'it did not say who it is within {_ANSWER:.0f} s')
    return True

  def _open(self) -> None:
    with contextlib.suppress(OSError):
      stranger, _ = self._listener.accept()
      stranger.setblocking(False)
      self._knocking[stranger] = (b'', time.monotonic() + _ANSWER)
      self._selector.register(stranger, selectors.EVENT_READ)
      if len(self._knocking) > _MOST_KNOCKING:
        self._refuse(next(iter(self._knocking)), f'{_MOST_KNOCKING} others have come')

  def _hear(self, stranger: socket.socket) -> None:
    if stranger not in self._knocking:  # Refused in this very look.
      return
    said, until = self._knocking[stranger]
    try:
      data = stranger.recv(_LONGEST_HELLO)
    except OSError as e:
      return self._refuse(stranger, str(e))
    said += data
    if not data or len(said) > _LONGEST_HELLO:
      return self._refuse(stranger, f'it said {said[:10]!r}')
    self._knocking[stranger] = (said, until)
    if not said.endswith(b'\n'):
      return None
    shown = secrets.compare_digest(said[: len(self._hello)], self._hello)
    number = said[len(self._hello) :].removesuffix(b']\n')
    index = int(number) if shown and number.isdigit() else 0
    if not 0 < index < self._count:
      # The token is nobody else's business.
      return self._refuse(stranger, 'it is no learner of this start of the run')
    return self._let_in(stranger, index)

  def _let_in(self, stranger: socket.socket, index: int) -> None:
    del self._knocking[stranger]
    self._selector.unregister(stranger)
    self._forget(index)  # It was started again meanwhile.
    connection = Connection(stranger, f'learner {index}')
    try:
      connection.send('welcome')
    except GangError:
      connection.close()
      return
    self.here[index] = connection
    self._selector.register(connection, selectors.EVENT_READ, index)

  def _forget(self, index: int) -> None:
    connection = self.here.pop(index, None)
    if connection is not None:
      self._selector.unregister(connection)
      connection.close()

  def _refuse(self, stranger: socket.socket, why: str) -> None:
    del self._knocking[stranger]
    self._selector.unregister(stranger)
    sender = 'unknown'
    with contextlib.suppress(OSError):
      sender = str(stranger.getpeername()[0])
    stranger.close()
    self._refusals.add(sender, why)
