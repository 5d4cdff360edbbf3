"""How learner 0 and the other learners of a run meet, and their connections (TCP).

Learner 0 listens on a port of its own choice and writes where to `gang.json` of the run
directory; the others read it until they get through. The token in it tells one start of
the gang from another.
"""

import contextlib
import json
import pathlib
import secrets
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from impala_jax.distributed.security import ports
from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory

_MEET_TIMEOUT = 300.0  # Seconds from the first learner to the last.
_SLICE = 0.2
_ANSWER = 5.0
_LONGEST = 2**16  # Bytes of one message.


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
    except ValueError as e:
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
  connections: dict[int, Connection] = {}
  with ports.listen('' if host else ports.LOOPBACK) as listener:
    listener.settimeout(_SLICE)
    place = {'host': host or ports.LOOPBACK, 'port': listener.getsockname()[1]}
    files.write_json(RunDirectory(run_dir).gang, {**place, 'token': token})
    while len(connections) < count - 1:
      if should_stop():
        return None
      if time.monotonic() > deadline:
        missing = ', '.join(str(i) for i in range(1, count) if i not in connections)
        raise GangError(
          f'learners {missing} of {count} did not come within {_MEET_TIMEOUT:.0f} s'
        )
      with contextlib.suppress(TimeoutError):
        connection = Connection(listener.accept()[0], 'a learner')
        index = _greet(connection, token, count)
        if index is None:
          connection.close()
          continue
        if index in connections:  # It was started again meanwhile.
          connections[index].close()
        connections[index] = connection
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
    except (OSError, ValueError, KeyError, GangError) as e:
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


def _greet(connection: Connection, token: str, count: int) -> int | None:
  """The index of the learner at the other end; None if it is none of this start."""
  try:
    match connection.receive(_ANSWER):
      case ['hello', str(said), int(index)] if 0 < index < count:
        if secrets.compare_digest(said.encode(), token.encode()):
          connection.name = f'learner {index}'
          connection.send('welcome')
          return index
  except GangError:
    pass
  return None
