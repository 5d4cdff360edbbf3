"""A client's connection to an inference server, and what both sides say first.

Messages are those of `connections.messages`: of `inference_wire` for steps, msgpack for
the rest. Answers have a status for a kind.
"""

import time
from typing import NoReturn

import msgpack

from impala_jax.acting import policy as policy_lib
from impala_jax.distributed.connections import messages
from impala_jax.distributed.inference import wire as inference_wire
from impala_jax.distributed.security import keys as run_keys
from impala_jax.distributed.transport import protocol as transport

JOIN, STEP, LEAVE = range(3)
OK, UNKNOWN, NO_ROOM, REFUSED = range(4)
# A call that waits longer than the longest deadline of a batch has lost its server.
CALL_TIMEOUT = 30.0


class Refused(ValueError):
  """The server takes this client for one of another run or version; says why."""


class Connection:
  """A connection to a `Server`, made with the first call. Used by one thread.

  Args:
    address: host:port.
    wire: the form of its messages.
    keys: of a client, where the server has keys.
    timeout: seconds that one call may take.
  """

  def __init__(
    self,
    address: str,
    wire: inference_wire.Wire,
    keys: run_keys.Keys | None = None,
    timeout: float = CALL_TIMEOUT,
  ):
    self.address = address
    self._wire = wire
    self._timeout = timeout
    self._client = messages.Client(address, run_keys.INFERENCE, keys)

  def join(self, client: str, environments: int) -> int:
    """See `Batcher.join`.

    Raises:
      transport.TransportError: no answer in time, or no room now.
      Refused: see there.
    """
    message = {
      'client': client,
      'environments': environments,
      'form': self._wire.fingerprint,
    }
    return msgpack.unpackb(self._call(JOIN, msgpack.packb(message), self._timeout))

  def step(self, request: inference_wire.Request) -> policy_lib.Decision:
    """The decisions on a request.

    Raises:
      policy_lib.StatesLost: the server does not know the session.
      transport.TransportError: no answer in time, or none that makes sense. Whether the
        step was made is not known: the session is of no use any more.
      Refused: see there.
    """
    reply = self._call(STEP, self._wire.pack_request(request), self._timeout)
    try:
      return self._wire.read_reply(reply, len(request.ids), int(request.begins.sum()))
    except inference_wire.WireError as e:
      raise transport.TransportError(f'{self._name}: {e}') from None

  def leave(self, session: int) -> None:
    """Raises transport.TransportError where nobody answers within two seconds."""
    self._call(LEAVE, msgpack.packb({'session': session}), 2.0)

  def close(self) -> None:
    """The server frees what the client has there. Idempotent."""
    self._client.close()

  @property
  def _name(self) -> str:
    return f'inference server at {self.address}'

  def _call(self, kind: int, message: bytes, timeout: float) -> bytes:
    deadline = time.monotonic() + timeout
    try:
      self._client.send(kind, message, timeout=timeout)
      status, reply = self._client.receive(deadline)
    except OSError as e:  # TimeoutError and those of TLS, too.
      # Not in step any more: the next call begins with a connection of its own.
      self._client.close()
      raise transport.TransportError(f'{self._name}: {e.strerror or e}') from None
    if status != OK:
      self._raise(status, reply.decode(errors='replace'))
    return reply

  def _raise(self, status: int, words: str) -> NoReturn:
    if status == UNKNOWN:
      raise policy_lib.StatesLost(words)
    if status == NO_ROOM:
      raise transport.TransportError(f'{self._name}: {words}')
    raise Refused(f'{self._name}: {words}')
