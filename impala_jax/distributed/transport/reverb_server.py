"""Reverb's server and the reading of its queue, without TensorFlow's Python package.

A process that reads through `reverb.TrajectoryDataset` imports TensorFlow (seconds, and
300 MB), and each tensor that TensorFlow 2.15 hands to Python costs 16 bytes for ever.
The compiled module of Reverb has all that a queue needs.
"""

import contextlib
import itertools
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import numpy.typing as npt

from impala_jax.distributed.security import ports
from impala_jax.distributed.transport import reverb_native

# Items that one sampler is made for. It costs a thread; of small rows it is most of
# the cost: 0.40 CPU-ms each with one, 0.14 with four, 0.07 with sixteen.
_AT_ONCE = 4
# Of this process.
_samplers = itertools.count(1)
_stderr = threading.Lock()


class Server:
  """A first-in-first-out queue of one-dimensional uint8 rows, and a table beside it.

  Args:
    queue: name of the table whose rows are read here, each once.
    size: rows that it holds before writers wait.
    other: name of a table that takes one item and is read by nobody.
    port: TCP port of all interfaces.

  Raises:
    ImportError: Reverb is not installed.
  """

  def __init__(self, queue: str, size: int, other: str, port: int):
    module = self._module = reverb_native.client_module()
    most = sys.float_info.max

    def table(name: str, size: int, times_sampled: int, low: float, high: float) -> Any:
      limiter = module.RateLimiter(
        samples_per_insert=1.0, min_size_to_sample=1, min_diff=low, max_diff=high
      )
      fifo = module.FifoSelector
      signature = None  # Which the server would not look at.
      return module.Table(
        name, fifo(), fifo(), size, times_sampled, limiter, [], signature
      )

    self._queue = table(queue, size, 1, 0.0, float(size))
    self._name = queue
    # Reverb insists on a place for checkpoints, which nobody asks it for, and looks
    # there when it starts. Gone after that, it is not left by a process that is killed.
    with tempfile.TemporaryDirectory(prefix='impala_jax-reverb-') as folder:
      self._server = module.Server(
        [self._queue, table(other, 1, 0, -most, most)],
        port,
        module.create_default_checkpointer(folder, '', None),
      )
    # Finds that the table is of this process, and goes there directly.
    self._client = module.Client(f'{ports.LOOPBACK}:{port}')

  def waiting(self) -> int:
    """Rows in the queue."""
    return reverb_native.table_of(self._queue.info()).size

  def take(self) -> Iterator[list[npt.NDArray[Any]]]:
    """Takes items that wait in the queue, none where there is none.

    It waits for nobody; but an item that claims an absurd size may never come out.

    Yields:
      What an item consists of: one row, unless it is of a stranger's making.

    Raises:
      RuntimeError: Reverb cannot read an item.
    """
    count = 0
    while count < _AT_ONCE and self._queue.can_sample(count + 1):
      count += 1
    if not count:
      return
    # Nobody else takes any, so that those counted are still there.
    with _quiet():
      sampler = self._client.NewSampler(self._name, count, count)
    for _ in range(count):
      tensors = sampler.GetNextTrajectory()
      yield tensors[self._module.Sampler.NUM_INFO_TENSORS :]

  def stop(self) -> None:
    """Ends the server; takes about a second where calls are open."""
    with contextlib.suppress(RuntimeError):
      self._server.Stop()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps Reverb from saying that a sampler is in its server's process.

  It does so with the samplers 1, 2, 4, 8, ... of a process, on descriptor 2, which at
  these times alone leads nowhere for a moment.
  """
  with _stderr:
    number = next(_samplers)
    if number & (number - 1):
      yield
      return
    saved = os.dup(2)
    try:
      with open(os.devnull, 'wb') as nowhere:
        os.dup2(nowhere.fileno(), 2)
      yield
    finally:
      os.dup2(saved, 2)
      os.close(saved)
