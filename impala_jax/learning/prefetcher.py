"""Batches for the learner: read and on their way to the devices one ahead."""

import queue
import threading
from collections.abc import Callable

import jax
import numpy as np
import numpy.typing as npt

from impala_jax.distributed.transport import protocol as transport

# What the thread has read, or what ended it.
_Item = tuple[transport.Batch, jax.Array] | Exception


class Prefetcher:
  """Reads batches and starts their transfer in a thread, one ahead.

  The first one is for `update`; what is older than `max_lag` updates by then, if that
  is not 0, the reader refuses. So it does with what claims to be newer than that update
  and `given_out`, which an earlier learner gave out: such parameters nobody can have.
  """

  def __init__(
    self,
    reader: transport.Reader,
    put: Callable[[npt.NDArray[np.uint8]], jax.Array],
    update: int = 0,
    max_lag: int = 0,
    given_out: int = 0,
  ):
    self._reader = reader
    self._put = put
    self._update = update
    self._max_lag = max_lag
    self._given_out = given_out
    self._queue: queue.Queue[_Item] = queue.Queue(maxsize=1)
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._run, name='prefetch', daemon=True)
    self._thread.start()

  def get(self, timeout: float) -> tuple[transport.Batch, jax.Array] | None:
    """The next batch, or None if none came in time. Raises the thread's error."""
    try:
      item = self._queue.get(timeout=timeout)
    except queue.Empty:
      return None
    if isinstance(item, Exception):
      raise item
    return item

  def close(self) -> None:
    self._stop.set()
    self._thread.join(timeout=5.0)

  def _run(self) -> None:
    while not self._stop.is_set():
      try:
        if self._max_lag:
          self._reader.refuse_older(self._update - self._max_lag)
        self._reader.refuse_newer(max(self._update, self._given_out))
        batch = self._reader.read(timeout=0.5)
        self._update += 1
        item: _Item = (batch, self._put(batch.rows))
      except TimeoutError:
        continue
      except transport.Closed:
        return
      except Exception as e:
        item = e
      while not self._stop.is_set():
        try:
          self._queue.put(item, timeout=0.5)
          break
        except queue.Full:
          continue
