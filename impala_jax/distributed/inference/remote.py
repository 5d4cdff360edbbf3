"""An actor's way to its inference server, which may restart, move or be away.

A `policy.Policy` without parameters and states: those are the server's. Each call is
one bounded attempt; the actor decides how often to repeat it (`patience.Patience`).
After any failure the session is given up and another begun: whether the step was made
before the answer was lost is not known, so the states may not be used again.

An actor's own server is restarted where it fails. One that stays away is replaced by
the run's others, which have room for that, until it has been started again.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from impala_jax import types
from impala_jax.acting import policy as policy_lib
from impala_jax.distributed.inference import connection as connection_lib
from impala_jax.distributed.inference import wire as inference_wire
from impala_jax.distributed.transport import protocol as transport

_STAY = 20.0  # Seconds of failures before the others are asked.
_LOOK = 10.0  # Seconds between looks whether the own server has been started again.


class ServerAddress(NamedTuple):
  """Where an inference server is, as it says itself."""

  address: str
  incarnation: int  # Which of its lives wrote that.


class RemotePolicy:
  """A policy that a server runs, see `policy.Policy`. Used by one thread.

  Args:
    servers: each says where one of the run's servers is now, None where that is not
      known; this actor's own comes first.
    connect: opens a connection to such an address.
    client: a name of its own for each actor; what the same name had before is freed.
    num_envs: N.

  Attributes:
    sessions: begun so far.
  """

  def __init__(
    self,
    servers: Sequence[Callable[[], ServerAddress | None]],
    connect: Callable[[str], connection_lib.Connection],
    client: str,
    num_envs: int,
  ):
    self._servers = list(servers)
    self._connect = connect
    self._client = client
    self._count = num_envs
    self._connection: connection_lib.Connection | None = None
    self._session = 0
    self._states: int | None = None  # Session that has those of the environments.
    self._version = -1
    self._at = 0  # Which server is asked.
    self._failing_since: float | None = None
    # Where the own server was when it was given up.
    self._left: ServerAddress | None = None
    self._next_look = 0.0
    self.sessions = 0

  @property
  def version(self) -> int:
    return self._version

  def renew(self) -> None:
    """Joins the server at first; after that parameters are its business.

    Goes back to the actor's own server where that has been started again.
    """
    if not self.sessions:
      self._open()
    elif self._at and time.monotonic() >= self._next_look:
      self._next_look = time.monotonic() + _LOOK
      if self._servers[0]() != self._left:
        logging.info('its own inference server has been started again')
        self.close()
        self._at = 0

  def act(
    self,
    ids: np.ndarray,
    timestep: types.TimeStep,
    last_action: np.ndarray,
    begins: np.ndarray,
  ) -> policy_lib.Decision:
    """See `policy.Policy`.

    Raises:
      connection_lib.Refused: the server belongs to another configuration.
    """
    connection = self._open()
    if self._states not in (None, self._session):
      self._states = None
      raise policy_lib.StatesLost('another session was begun')
    request = inference_wire.Request(self._session, ids, begins, last_action, timestep)
    self._states = self._session
    try:
      decision = connection.step(request)
    except policy_lib.StatesLost:
      logging.warning('%s has no states of this actor any more', connection.address)
      self._states = None
      self._drop()
      raise
    except transport.TransportError as e:
      logging.warning('%s', e)
      self._drop()
      self._failed()
      raise
    self._failing_since = None
    self._version = decision.version
    return decision

  def close(self) -> None:
    """See `policy.Policy`."""
    if self._connection is not None:
      with contextlib.suppress(transport.TransportError, policy_lib.StatesLost):
        self._connection.leave(self._session)
    self._drop()

  def _open(self) -> connection_lib.Connection:
    if self._connection is not None:
      return self._connection
    found = self._servers[self._at]()
    if found is None:
      self._failed()
      raise transport.TransportError('no inference server has written its address')
    connection = self._connect(found.address)
    try:
      self._session = connection.join(self._client, self._count)
    except BaseException as e:
      connection.close()
      if isinstance(e, transport.TransportError):
        self._failed()
      raise
    self._connection = connection
    self.sessions += 1
    logging.info('the policy is that of the inference server at %s', found.address)
    return connection

  def _failed(self) -> None:
    """After a while each failure has another server asked next."""
    now = time.monotonic()
    self._failing_since = self._failing_since or now
    if now - self._failing_since < _STAY or len(self._servers) == 1:
      return
    if not self._at:
      self._left = self._servers[0]()
      self._next_look = now + _LOOK
    self._at = (self._at + 1) % len(self._servers)

  def _drop(self) -> None:
    if self._connection is not None:
      self._connection.close()
    self._connection = None
