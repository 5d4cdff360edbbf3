"""The heart of an inference server: many clients' requests, one policy call for all.

A client joins and gets room for the recurrent states of its environments, which stay
on the device. Its requests wait with those of the others until there are enough of them
or the oldest has waited long enough; they are padded to one of a few sizes, all of
which were compiled before the first. Knows nothing of how requests travel.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import threading
import time
from typing import NamedTuple

import jax
import numpy as np

from impala_jax.acting import device_policy
from impala_jax.acting import policy as policy_lib
from impala_jax.distributed.inference import sessions as inference_sessions
from impala_jax.distributed.inference import wire as inference_wire

_SIZES = 4  # Batch sizes: the largest, and halves of it.
_END_TIMEOUT = 30.0


@dataclasses.dataclass
class Totals:
  """Counts since the start; all of them only grow.

  Attributes:
    requests: answered.
    rows: environments in them.
    batches: policy calls.
    padding: rows of these calls that belong to nobody.
    waited: seconds between a request's arrival and its policy call, over requests.
    idle: seconds in which no call was running, for want of requests or of time.
    refused: requests that made no sense.
  """

  requests: int = 0
  rows: int = 0
  batches: int = 0
  padding: int = 0
  waited: float = 0.0
  idle: float = 0.0
  refused: int = 0


class _Batch(NamedTuple):
  waiting: list['_Waiting']
  new: list[np.ndarray]  # Rows of the states to be set anew before.


@dataclasses.dataclass(eq=False)
class _Waiting:
  """One request on its way. Answered by its future."""

  session: inference_sessions.Session
  slots: np.ndarray  # int32 [K], rows of the states.
  request: inference_wire.Request
  arrived: float
  future: 'concurrent.futures.Future[policy_lib.Decision]'

  def fail(self, why: str) -> None:
    # One whose client has given up is waited for by nobody.
    if self.future.set_running_or_notify_cancel():
      self.future.set_exception(inference_sessions.UnknownSession(why))


def batch_sizes(max_batch: int) -> list[int]:
  """Rows of policy calls, smallest first."""
  return sorted({-(-max_batch // 2**i) for i in range(_SIZES)})


class Batcher:
  """Runs the policy for many clients. Its methods may be called from any thread.

  Args:
    policy: what decides, with room for all states and with parameters. It is compiled,
      and only set anew from here.
    environments: how many states there is room for.
    deadline: seconds that the oldest request waits for more to come. None waits longer
      once every client waits, or there are as many rows as a policy call can have.

  Attributes:
    error: what ended it, if something did.
  """

  def __init__(
    self, policy: device_policy.DevicePolicy, environments: int, deadline: float
  ):
    self._policy = policy
    self._deadline = deadline
    self.error: Exception | None = None
    self._totals = Totals()
    self._lock = threading.Condition()
    self._closed = False
    self._sessions = inference_sessions.Sessions(environments, self._forget)
    self._queue: collections.deque[_Waiting] = collections.deque()
    self._thread = threading.Thread(target=self._run, name='batcher', daemon=True)
    self._thread.start()

  @property
  def max_batch(self) -> int:
    """Rows that a request may have, and that run at once."""
    return self._policy.largest

  @property
  def capacity(self) -> int:
    """Environments that there is room for."""
    return self._sessions.capacity

  def totals(self) -> Totals:
    """A copy."""
    with self._lock:
      return dataclasses.replace(self._totals)

  def clients(self) -> int:
    with self._lock:
      return len(self._sessions)

  def environments(self) -> int:
    """Of all clients."""
    with self._lock:
      return self._sessions.environments

  def join(self, client: str, environments: int) -> int:
    """Room for `environments` states, in their initial form.

    What the same client had before is given up.

    Returns:
      The number of the session, for `submit`.

    Raises:
      inference_sessions.NoRoom: see there.
      ValueError: `environments` is no number that could ever be had.
    """
    with self._lock:
      return self._sessions.join(client, environments)

  def leave(self, number: int) -> None:
    """Frees the states of a session; one that is not there is no error."""
    with self._lock:
      self._sessions.leave(number)
      self._lock.notify_all()  # The others may be all now.

  def submit(
    self, request: inference_wire.Request
  ) -> 'concurrent.futures.Future[policy_lib.Decision]':
    """The decision, once it is made.

    Raises:
      inference_sessions.UnknownSession: see there; so may the future.
      inference_wire.WireError: the request makes no sense for its session.
    """
    with self._lock:
      if self._closed:
        raise inference_sessions.UnknownSession('the server ends')
      session = self._sessions.get(request.session)
      session.heard = time.monotonic()
      ids = request.ids
      if not ((ids >= 0) & (ids < len(session.slots))).all():
        raise inference_wire.WireError(
          f'environments {ids.tolist()}: there are {len(session.slots)}'
        )
      if len(ids) > self.max_batch:
        raise inference_wire.WireError(f'{len(ids)} rows: at most {self.max_batch}')
      if session.waiting is not None:
        raise inference_wire.WireError('a request of this client is under way already')
      session.waiting = _Waiting(
        session,
        session.slots[ids],
        request,
        time.monotonic(),
        concurrent.futures.Future(),
      )
      self._queue.append(session.waiting)
      self._lock.notify_all()
      return session.waiting.future

  def refuse(self) -> None:
    """Counts a request that never became one."""
    with self._lock:
      self._totals.refused += 1

  def close(self) -> None:
    """Ends the thread; what waits ends with `UnknownSession`. Idempotent, bounded."""
    with self._lock:
      self._closed = True
      self._lock.notify_all()
    self._thread.join(_END_TIMEOUT)

  # --- with the lock held ---

  def _forget(self, session: inference_sessions.Session) -> None:
    if session.waiting in self._queue:
      # Not run any more: its rows of the states may soon be another's.
      self._queue.remove(session.waiting)
      session.waiting.fail('the client has left')

  def _due(self, now: float) -> bool:
    if not self._queue:
      return False
    rows = sum(len(w.slots) for w in self._queue)
    return (
      rows >= self.max_batch
      or len(self._queue) >= len(self._sessions)
      or now >= self._queue[0].arrived + self._deadline
    )

  # --- the thread ---

  def _run(self) -> None:
    running: tuple[_Batch, device_policy.Running] | None = None
    try:
      while True:
        # Where a batch is due, it is made ready while the device works on another.
        batch = self._take(wait=running is None)
        if batch is None and running is None:
          break
        started = (batch, self._start(batch)) if batch else None
        if running is not None:
          self._finish(*running)
        running = started
    except Exception as e:
      logging.exception('the batcher failed')
      self.error = e
    with self._lock:
      self._closed = True
      left = [s.waiting for s in self._sessions.all() if s.waiting is not None]
      self._queue.clear()
    for waiting in left:
      if not waiting.future.done():
        waiting.fail('the server ends')

  def _take(self, wait: bool) -> _Batch | None:
    """The next batch, oldest first; None at the end, or where none is due."""
    start = time.monotonic()
    with self._lock:
      while not self._closed and not self._due(now := time.monotonic()):
        if not wait:
          return None
        until = self._queue[0].arrived + self._deadline if self._queue else now + 1.0
        self._lock.wait(max(0.0, until - now))
      if self._closed:
        return None
      batch, rows = [], 0
      while self._queue and rows + len(self._queue[0].slots) <= self.max_batch:
        batch.append(self._queue.popleft())
        rows += len(batch[-1].slots)
      now = time.monotonic()
      totals = self._totals
      totals.idle += now - start if wait else 0.0
      totals.waited += sum(now - w.arrived for w in batch)
      totals.batches += 1
      totals.requests += len(batch)
      totals.rows += rows
      totals.padding += self._policy.size(rows) - rows
      # In one go with the requests: rows that a client leaves from now on may be run
      # for it still, and are set anew for the next one after that.
      return _Batch(batch, self._sessions.take_new())

  def _start(self, batch: _Batch) -> device_policy.Running:
    for slots in batch.new:
      self._policy.reset(slots)
    join = lambda *x: np.concatenate(x)
    slots = join(*[w.slots for w in batch.waiting])
    requests = [w.request for w in batch.waiting]
    timestep, last_action, begins = jax.tree.map(
      join, *[(r.timestep, r.last_action, r.begins) for r in requests]
    )
    return self._policy.start(slots, timestep, last_action, begins)

  def _finish(self, batch: _Batch, running: device_policy.Running) -> None:
    out, states = self._policy.finish(running)
    with self._lock:
      for waiting in batch.waiting:
        waiting.session.waiting = None
    row = begun = 0
    for waiting in batch.waiting:
      rows = slice(row, row + len(waiting.slots))
      begins = slice(begun, begun + int(waiting.request.begins.sum()))
      row, begun = rows.stop, begins.stop
      action, log_prob, logits = (x[rows] for x in out)
      own = jax.tree.map(lambda x, begins=begins: x[begins], states)
      # One whose client has given up is waited for by nobody.
      if waiting.future.set_running_or_notify_cancel():
        waiting.future.set_result(
          policy_lib.Decision(action, log_prob, logits, own, running.version)
        )
