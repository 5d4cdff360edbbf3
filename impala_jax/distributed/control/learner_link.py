"""A client's link to a learner that may restart, move to another address or be away.

An actor keeps its environments through all of that. Each call here is one bounded
attempt, as with the transport and the parameters themselves: who calls decides how
often to repeat it and for how long (`patience.Patience`). What is done here is to
look where the learner is now, to connect anew after a failure or a move, and to fail
at once between attempts, whose pauses grow.

Under a supervisor a learner that says stop may only be leaving its machine: there the
run has ended when `ended.json` says so.
"""

import contextlib
import logging
import random
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from impala_jax import types
from impala_jax.distributed.control import grpc as control_grpc
from impala_jax.distributed.control import locator as locator_lib
from impala_jax.distributed.control import protocol
from impala_jax.distributed.security import keys as run_keys
from impala_jax.distributed.security import tunnel as tls_tunnel
from impala_jax.distributed.transport import protocol as transport

_START = 180.0  # Seconds, at least, for a learner to come up.

# Seconds between two looks at the learner's address: a small file on a shared disk.
_LOOK = 2.0
_FIRST_PAUSE = 0.25  # Seconds between attempts after the first failure; it doubles.
_LONGEST_PAUSE = 5.0
_T = TypeVar('_T')
_R = TypeVar('_R')


def open_link(
  locator: locator_lib.Locator, should_stop: Callable[[], bool], writes: bool
) -> 'LearnerLink | None':
  """Waits for the learner; None if told to stop before it came.

  Args:
    locator: to it.
    should_stop: ends the wait.
    writes: whether this client sends unrolls.

  Raises:
    TimeoutError: no learner came up.
    run_keys.KeysError, tls_tunnel.TunnelError: see `LearnerLink`.
  """
  limit = locator.patience
  seconds = max(_START, limit or 0.0)
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if should_stop():
      return None
    if address := locator.address():
      return LearnerLink(locator, address, writes, supervised=limit is not None)
    time.sleep(0.2)
  raise TimeoutError(
    f'no learner wrote its address to {locator.run_dir} within {seconds:.0f} s'
  )


class LearnerLink:
  """Writer, parameter source and control of one client. Used by one thread.

  Args:
    locator: see there.
    address: where the learner is now.
    writes: whether this client sends unrolls.
    supervised: whether somebody restarts learners. Else a run ends with its learner.

  Attributes:
    reconnections: connections that were made anew.

  Raises:
    run_keys.KeysError, tls_tunnel.TunnelError: no connection will ever be possible.
  """

  def __init__(
    self,
    locator: locator_lib.Locator,
    address: dict[str, str],
    writes: bool = True,
    supervised: bool = False,
  ):
    self._locator = locator
    self._address = address
    self._supervised = supervised
    self._learner = ''  # Whose parameters the client has.
    self._leaving = False  # The learner has said stop, and the run goes on.
    self._next_look = time.monotonic() + _LOOK
    self._lost_at: float | None = None
    self._closed = False
    self._control = _Connection(self._open_control)
    self._writer = _Connection(lambda: locator.writer(self._address['transport']))
    self._parts = (self._control, self._writer) if writes else (self._control,)
    try:
      for part in self._parts:
        part.open()
    except BaseException:
      self.close()
      raise

  @property
  def reconnections(self) -> int:
    return sum(part.opened - 1 for part in self._parts)

  def write(self, row: npt.NDArray[np.uint8], timeout: float) -> None:
    """See `transport.Writer`. A row that did not arrive may be sent again."""
    self._check_leaving()
    self._call(self._writer, lambda writer: writer.write(row, timeout))

  def fetch(self, have_version: int) -> tuple[int, types.Nest] | None:
    """See `protocol.ParameterSource`; after a restart the version may be lower.

    Args:
      have_version: the version that the last fetch gave, or a newer one up to which
        nothing newer is wanted.
    """
    self._check_leaving()

    def ask(client: control_grpc.Client) -> tuple[int, types.Nest] | None:
      newer = client.fetch(have_version)
      if newer is not None and client.learner != self._learner:
        if self._learner:
          logging.info('takes version %d of a learner that has restarted', newer[0])
        self._learner = client.learner
      return newer

    return self._call(self._control, ask)

  def report(self, report: protocol.Report) -> bool:
    """See `protocol.Client`; False, too, where a learner that is away was the
    last of the run.

    Raises:
      transport.TransportError: it is away, or leaving, and the run goes on.
    """
    try:
      goes_on = self._call(self._control, lambda client: client.report(report))
    except transport.Closed:
      raise
    except transport.TransportError:
      if self._supervised and self._locator.ended():
        return False
      raise
    if goes_on:
      self._leaving = False
      return True
    if not self._supervised or self._locator.ended():
      return False
    if not self._leaving:
      logging.info('the learner at %s leaves; waits for another', self._place)
      self._leaving = True
    self._check_leaving()
    return True

  def close(self) -> None:
    """Idempotent; further calls raise `transport.Closed`. Bounded in time."""
    self._closed = True
    for part in self._parts:
      part.close()

  @property
  def _place(self) -> str:
    return self._address['control']

  def _open_control(self) -> contextlib.AbstractContextManager[control_grpc.Client]:
    client = self._locator.control(self._address['control'])
    client.learner = self._learner
    return contextlib.closing(client)

  def _check_leaving(self) -> None:
    """What a learner takes while it closes down is lost."""
    self._look()
    if self._leaving:
      raise transport.TransportError(f'the learner at {self._place} is leaving')

  def _call(self, part: '_Connection[_T]', use: Callable[[_T], _R]) -> _R:
    if self._closed:
      raise transport.Closed('the link was closed')
    self._look()
    try:
      result = part.call(use)
    except transport.Closed:
      raise
    except transport.TransportError as e:
      if self._lost_at is None:
        self._lost_at = time.monotonic()
        logging.warning('out of reach: %s', e)
      raise
    if self._lost_at is not None:
      away = time.monotonic() - self._lost_at
      logging.info('the learner at %s answers after %.0f s', self._place, away)
      self._lost_at = None
    return result

  def _look(self) -> None:
    """Follows the learner where its address has changed."""
    now = time.monotonic()
    if now < self._next_look:
      return
    self._next_look = now + _LOOK
    newest = self._locator.address()
    if newest is None or newest == self._address:
      return
    logging.info('the learner has moved from %s to %s', self._place, newest['control'])
    self._address = newest
    self._leaving = False
    for part in self._parts:
      part.reset()


class _Connection(Generic[_T]):
  """One connection, made anew after a failure."""

  def __init__(self, make: Callable[[], contextlib.AbstractContextManager[_T]]):
    self._make = make
    self._stack = contextlib.ExitStack()
    self._made: _T | None = None
    self.opened = 0
    self._pause = 0.0
    self._not_before = 0.0
    self._reason = ''

  def open(self) -> _T:
    if self._made is None:
      self._made = self._stack.enter_context(self._make())
      self.opened += 1
    return self._made

  def call(self, use: Callable[[_T], _R]) -> _R:
    """Raises TransportError where `use` does, and at once in a pause after that."""
    if time.monotonic() < self._not_before:
      raise transport.TransportError(self._reason)
    try:
      result = use(self.open())
    except (TimeoutError, transport.Closed):
      self._pause = 0.0  # A full queue: the learner has answered.
      raise
    except (
      transport.TransportError,
      tls_tunnel.TunnelError,
      run_keys.KeysError,
      OSError,
    ) as e:
      self.close()
      self._pause = min(max(2 * self._pause, _FIRST_PAUSE), _LONGEST_PAUSE)
      # Not a thousand actors at the same moment.
      self._not_before = time.monotonic() + self._pause * random.uniform(0.5, 1.0)
      self._reason = str(e)
      raise transport.TransportError(self._reason) from e
    self._pause = 0.0
    return result

  def reset(self) -> None:
    """The next call connects anew, at once."""
    self.close()
    self._pause = self._not_before = 0.0

  def close(self) -> None:
    self._made = None
    self._stack.close()
