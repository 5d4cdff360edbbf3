"""Waiting for a learner or an inference server that is busy or away, with an end."""

import time
from collections.abc import Callable
from typing import TypeVar

from impala_jax.distributed.transport import protocol as transport

SECONDS = 120.0  # Without a learner, where nothing else is said.

_T = TypeVar('_T')
# A full queue is normal, and a learner may compile for minutes: the queue may be full
# for so many times the seconds that the learner may be away, up to this limit.
_FULL_FACTOR = 10
_FULL_LIMIT = 1200.0


class Stopped(Exception):
  """The run is ending; raised inside blocking loops."""


class Patience:
  """Repeats calls to a learner.

  Args:
    who: whose call it is, for the error.
    seconds: that the learner may be away. Its queue may be full for ten times as long,
      or for the greater of `seconds` and twenty minutes where that is less.
    should_stop: asked before every attempt.
  """

  def __init__(self, who: str, seconds: float, should_stop: Callable[[], bool]):
    self._who = who
    self._seconds = seconds
    self._full = min(_FULL_FACTOR * seconds, max(seconds, _FULL_LIMIT))
    self._should_stop = should_stop

  def call(self, attempt: Callable[[], _T], server: str = 'learner') -> _T:
    """What `attempt` returns when it succeeds.

    Args:
      attempt: one call, bounded in time.
      server: whom it is to, for the error.

    Raises:
      Stopped: `should_stop`, or the transport was closed.
      transport.TransportError: the learner stayed away.
      TimeoutError: its queue stayed full.
    """
    absent_until = full_until = None
    pause = 0.1
    while True:
      if self._should_stop():
        raise Stopped
      now = time.monotonic()
      try:
        return attempt()
      except TimeoutError:
        absent_until = None
        full_until = full_until or now + self._full
        if now > full_until:
          raise TimeoutError(
            f'{self._who}: the queue has been full for {self._full:.0f} s; '
            'the learner takes nothing'
          ) from None
      except transport.Closed:
        raise Stopped from None
      except transport.TransportError as e:
        full_until = None
        absent_until = absent_until or now + self._seconds
        if now > absent_until:
          raise transport.TransportError(
            f'{self._who} has been without its {server} for {self._seconds:.0f} s: {e}'
          ) from e
        time.sleep(pause)
        pause = min(2 * pause, 2.0)
