"""An actor's way to its inference server, which may restart, move or be away.

A `policy.Policy` without parameters and states: those are the server's. Each call is
one bounded attempt; the actor decides how often to repeat it (`patience.Patience`).
After any failure the session is given up and another begun: whether the step was made
before the answer was lost is not known, so the states may not be used again.
"""

import contextlib
import logging
from collections.abc import Callable

import numpy as np

from impala_jax import policy as policy_lib
from impala_jax import types
from impala_jax.distributed import inference_channel, inference_wire, transport


class Remote:
  """A policy that a server runs, see `policy.Policy`. Used by one thread.

  Args:
    find: says where the server is now, None where that is not known.
    connect: opens a connection to such an address.
    client: a name of its own for each actor; what the same name had before is freed.
    num_envs: N.

  Attributes:
    sessions: begun so far.
  """

  def __init__(
    self,
    find: Callable[[], str | None],
    connect: Callable[[str], inference_channel.Channel],
    client: str,
    num_envs: int,
  ):
    self._find = find
    self._connect = connect
    self._client = client
    self._count = num_envs
    self._channel: inference_channel.Channel | None = None
    self._session = 0
    self._states: int | None = None  # Session that has those of the environments.
    self._version = -1
    self.sessions = 0

  @property
  def version(self) -> int:
    return self._version

  def renew(self) -> None:
    """Joins the server at first; after that parameters are its business."""
    if not self.sessions:
      self._open()

  def act(
    self,
    ids: np.ndarray,
    timestep: types.TimeStep,
    last_action: np.ndarray,
    begins: np.ndarray,
  ) -> policy_lib.Decision:
    """See `policy.Policy`.

    Raises:
      inference_channel.Refused: the server belongs to another configuration.
    """
    channel = self._open()
    if self._states not in (None, self._session):
      self._states = None
      raise policy_lib.StatesLost('another session was begun')
    request = inference_wire.Request(self._session, ids, begins, last_action, timestep)
    self._states = self._session
    try:
      decision = channel.step(request)
    except policy_lib.StatesLost:
      logging.warning('%s has no states of this actor any more', channel.address)
      self._states = None
      self._drop()
      raise
    except transport.TransportError as e:
      logging.warning('%s', e)
      self._drop()
      raise
    self._version = decision.version
    return decision

  def close(self) -> None:
    """See `policy.Policy`."""
    if self._channel is not None:
      with contextlib.suppress(transport.TransportError, policy_lib.StatesLost):
        self._channel.leave(self._session)
    self._drop()

  def _open(self) -> inference_channel.Channel:
    if self._channel is not None:
      return self._channel
    address = self._find()
    if address is None:
      raise transport.TransportError('no inference server has written its address')
    channel = self._connect(address)
    try:
      self._session = channel.join(self._client, self._count)
    except BaseException:
      channel.close()
      raise
    self._channel = channel
    self.sessions += 1
    logging.info('the policy is that of the inference server at %s', address)
    return channel

  def _drop(self) -> None:
    if self._channel is not None:
      self._channel.close()
    self._channel = None
