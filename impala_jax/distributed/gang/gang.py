"""Several learner processes that update as one: they join, keep step, and end together.

`jax.distributed` joins their devices. Beside it each learner has a connection to
learner 0. Over these it hears before every update that all have their share of the
batch, and that nobody wants to stop; only then does it say go. So no learner enters a
collective that another will not enter, all carry out the same number of updates, and
one that starves or stops holds nobody in a collective. The word for the next update
travels while the device works on this one.

A learner that has gone, says nothing, or does not end its part of an update ends the
others, each with the cause; whoever started them starts all of them again.
"""

import contextlib
import logging
import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from impala_jax.distributed.gang.meeting import Connection, GangError
from impala_jax.learning import agreement
from impala_jax.learning.agreement import Verdict

_SLICE = 0.5  # Seconds that `decide` waits.
_PING = 10.0  # Seconds between signs of life.
_PATIENCE = 120.0  # Seconds without one, or for an update.
_FIRST_PATIENCE = 900.0  # The same until the first updates have been compiled.
_TOGETHER = 300.0  # Seconds that one waits for the others outside of updates.
_LEAVE = 10.0


class Gang(agreement.Agreement):
  """One learner of several. Used by one thread.

  Args:
    index: of this learner.
    count: of learners.
    connections: of learner 0 to each other by index; of others the one to learner 0.
    leave: ends the process at once, with a cause.
  """

  def __init__(
    self,
    index: int,
    count: int,
    connections: Mapping[int, Connection],
    leave: Callable[[str], None],
  ):
    self.index, self.count = index, count
    self._connections = dict(connections)
    self._leave = leave
    self._ready: set[int] = set()  # Learner 0: who has its share.
    self._said_ready = self._said_stop = False
    self._stopper: int | None = None  # Who wanted to stop.
    self._updates = 0
    self._pinged = 0.0
    self._deadline: float | None = None  # Of the present wait for the device.
    self._ended = threading.Event()
    self._watcher = threading.Thread(target=self._watch, name='gang', daemon=True)
    self._watcher.start()

  def decide(self, ready: bool, stop: bool) -> Verdict:
    """See `Agreement`."""
    verdict = (
      self._decide_first(ready, stop)
      if self.index == 0
      else (self._decide_other(ready, stop))
    )
    self._updates += verdict is Verdict.GO
    return verdict

  @contextlib.contextmanager
  def updating(self) -> Iterator[None]:
    """See `Agreement`."""
    self._deadline = time.monotonic() + self._patience
    try:
      yield
    finally:
      self._deadline = None
      for connection in self._connections.values():  # They were as busy as this one.
        connection.heard = time.monotonic()

  @contextlib.contextmanager
  def together(self) -> Iterator[None]:
    """See `Agreement`; an error inside ends the process at once.

    The others notice at once, too. An orderly way out would keep them waiting, and
    leave the cause to be overtaken by JAX, which ends a process whose peer has gone.
    """
    try:
      yield
    except Exception as e:
      # Where a collective failed because another learner has gone, that is the cause.
      if not self._watcher_leaves():
        logging.exception('learner %d failed', self.index)
        self._leave(f'{type(e).__name__}: {e}')
      raise

  @property
  def stopped_by(self) -> int | None:
    """See `Agreement`."""
    return None if self._stopper == self.index else self._stopper

  def gather(self) -> None:
    """See `Agreement`."""
    if self.index:
      self._connections[0].send('here')
    else:
      for connection in self._connections.values():
        self._await(connection, 'here')

  def spread(self, value: Any = None) -> Any:
    """See `Agreement`."""
    if self.index:
      return self._await(self._connections[0], 'say')
    self._tell_all('say', value)
    return value

  def finish(self) -> None:
    """See `Agreement`. The process must end soon after this."""
    self.gather()
    if self.index:
      self.spread()
      self._ended.set()
      return
    # From here on the others end. Learner 0 ends last: JAX kills them without it.
    self._ended.set()
    self._watcher.join()
    self.spread()
    deadline = time.monotonic() + _LEAVE
    for connection in self._connections.values():
      with contextlib.suppress(GangError):
        while time.monotonic() < deadline:
          connection.receive(deadline - time.monotonic())

  @property
  def _patience(self) -> float:
    return _PATIENCE if self._updates > 2 else _FIRST_PATIENCE

  def _decide_first(self, ready: bool, stop: bool) -> Verdict:
    deadline = time.monotonic() + (_SLICE if ready else 0.0)
    while True:
      for index, connection in self._connections.items():
        while (message := connection.receive()) is not None:
          if message[0] == 'ready':
            self._ready.add(index)
          elif message[0] == 'stop':
            self._stopper = index
      if stop:
        self._stopper = 0
      if self._stopper is not None:
        self._tell_all('stop', self._stopper)
        return Verdict.STOP
      if ready and len(self._ready) == len(self._connections):
        self._ready.clear()
        self._tell_all('go')
        return Verdict.GO
      self._check_signs_of_life()
      left = deadline - time.monotonic()
      if left <= 0:
        return Verdict.WAIT
      select.select(list(self._connections.values()), [], [], left)

  def _decide_other(self, ready: bool, stop: bool) -> Verdict:
    connection = self._connections[0]
    if ready and not self._said_ready:
      connection.send('ready')
      self._said_ready = True
    if stop and not self._said_stop:
      connection.send('stop')
      self._said_stop = True
    deadline = time.monotonic() + (_SLICE if ready or stop else 0.0)
    while True:
      message = connection.receive(max(0.0, deadline - time.monotonic()))
      if message is None:
        self._check_signs_of_life()
        return Verdict.WAIT
      if message[0] == 'go':
        self._said_ready = False
        return Verdict.GO
      if message[0] == 'stop':
        self._stopper = message[1]
        return Verdict.STOP

  def _check_signs_of_life(self) -> None:
    now = time.monotonic()
    if now - self._pinged > _PING:
      self._tell_all('alive')
      self._pinged = now
    for connection in self._connections.values():
      if now - connection.heard > self._patience:
        raise GangError(
          f'{connection.name} has said nothing for {self._patience:.0f} s'
        )

  def _await(self, connection: Connection, word: str) -> Any:
    """What follows the next message with this word; others are out of date."""
    deadline = time.monotonic() + _TOGETHER
    while (left := deadline - time.monotonic()) > 0:
      message = connection.receive(left)
      if message is not None and message[0] == word:
        return message[1] if len(message) > 1 else None
    raise GangError(f'{connection.name} did not get so far within {_TOGETHER:.0f} s')

  def _tell_all(self, *message: Any) -> None:
    for connection in self._connections.values():
      connection.send(*message)

  def _watcher_leaves(self) -> bool:
    """Gives the watching thread the time to find that another learner has gone."""
    self._watcher.join(2.0)
    return not self._watcher.is_alive()

  def _watch(self) -> None:
    """Ends the process when another learner has gone or an update does not end."""
    poll = select.poll()
    names = {
      connection.fileno(): connection.name for connection in self._connections.values()
    }
    for number in names:
      # Not what there is to read: that is for the other thread.
      poll.register(number, select.POLLRDHUP)
    while not self._ended.is_set():
      gone = poll.poll(500)
      if self._ended.is_set():
        return
      if gone:
        name = names[gone[0][0]]
        self._leave(f'GangError: {name} has left; its own log says why')
        return
      deadline = self._deadline
      if deadline is not None and time.monotonic() > deadline:
        self._leave(
          f'GangError: an update has not ended within {self._patience:.0f} s: a '
          'learner hangs or is out of reach'
        )
        return
