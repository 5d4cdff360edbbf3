"""Simulated actors for `fleet_benchmark`: real transport, no environment, no policy.

One process holds many clients, a thread each. A client has a writer and a connection
to the parameters of its own, as an actor process has; it sends an unroll when one is
due, fetches once in as many unrolls as an actor has environments, and reports every two
seconds. Rows come from a pool: only those that are on their way take memory.
"""

import contextlib
import functools
import json
import queue
import random
import signal
import sys
import threading
import time
from typing import Any

import numpy as np

from experiments.benchmarks import fleet_arithmetic, transport_benchmark
from impala_jax.acting import patience
from impala_jax.distributed.control import endpoints
from impala_jax.distributed.control import reporter as reporter_lib
from impala_jax.distributed.transport import protocol as transport

_PATIENCE = 120.0  # Seconds without the learner.


class Fleet:
  """The clients of one process.

  Args:
    transport: by which unrolls travel.
    address: `control` and `transport` of the learner.
    first: index of the first client.
    count: how many.
    period: seconds between two unrolls of one client.
    envs: environments that each pretends to have.
  """

  def __init__(
    self,
    transport: str,
    address: dict[str, str],
    first: int,
    count: int,
    period: float,
    envs: int,
  ):
    self._transport = transport
    self._address = address
    self._period = period
    self._envs = envs
    self._layout = transport_benchmark.layout('dmlab')
    self._content = transport_benchmark.make_rows(self._layout, 'smooth')[0]
    self._rows: queue.LifoQueue[np.ndarray] = queue.LifoQueue()
    self._stop = threading.Event()
    self.silent = False  # Set: no more unrolls, only reports.
    self.errors: list[str] = []
    self.late = 0  # Unrolls that became due while the one before was on its way.
    self._threads = [
      threading.Thread(target=self._run, args=(first + i,)) for i in range(count)
    ]

  def run(self) -> None:
    """Until the learner says stop."""
    for thread in self._threads:
      thread.start()
    for thread in self._threads:
      thread.join()

  def _run(self, index: int) -> None:
    try:
      self._act(index)
    except Exception as e:
      self.errors.append(f'client {index}: {type(e).__name__}: {e}')
      print(self.errors[-1], file=sys.stderr, flush=True)

  def _act(self, index: int) -> None:
    rng = random.Random(index)
    version, sent = -1, 0
    retry = patience.Patience(f'client {index}', _PATIENCE, self._stop.is_set).call
    with contextlib.ExitStack() as stack:
      client = stack.enter_context(
        contextlib.closing(endpoints.open_control(self._address['control']))
      )
      writer = stack.enter_context(
        endpoints.open_writer(self._transport, self._own_address(index), self._layout)
      )
      reporter = reporter_lib.Reporter(
        client, 'actor', index, 1, fleet_arithmetic.REPORT_INTERVAL
      )
      try:
        due = time.monotonic()
        while not self._stop.is_set():
          if version < 0 or (sent + index) % self._envs == 0:
            version = retry(functools.partial(_fetch, client, version))
          with self._row() as row:
            self._layout.seal(
              row, actor_id=index, incarnation=1, sequence=sent, version=version
            )
            retry(functools.partial(writer.write, row, timeout=1.0))
          sent += 1
          if sent == 1:
            # All begin at once; from here on they are spread over the period.
            due = time.monotonic() + self._period * rng.random()
          else:
            due += self._period
          if due < time.monotonic():
            self.late += 1
            due = time.monotonic()
          self._wait(due, reporter, sent)
      except patience.Stopped:
        pass
      with contextlib.suppress(transport.TransportError):
        reporter.maybe_report({'unrolls': sent}, left=True)

  def _wait(self, due: float, reporter: reporter_lib.Reporter, sent: int) -> None:
    """Until the next unroll is due, reporting; one report at least."""
    while True:
      with contextlib.suppress(transport.TransportError):
        if not reporter.maybe_report({'unrolls': sent}):
          self._stop.set()
      left = 1.0 if self.silent else due - time.monotonic()
      if left <= 0 or self._stop.wait(min(left, 1.0)):
        return

  def _own_address(self, index: int) -> str:
    address = self._address['transport']
    return own_address(address, index) if self._transport == 'reverb' else address

  @contextlib.contextmanager
  def _row(self) -> Any:
    try:
      row = self._rows.get_nowait()
    except queue.Empty:
      row = self._layout.allocate(1)[0]
      row[:] = self._content
    try:
      yield row
    finally:
      self._rows.put(row)


def own_address(address: str, index: int) -> str:
  """A loopback address of the same port that no other client uses.

  gRPC lets all clients of a process share one connection to an address. Actors are
  processes, and each has its own.
  """
  port = address.rsplit(':', 1)[1]
  return f'127.{1 + index // 62_500}.{index // 250 % 250}.{1 + index % 250}:{port}'


def _fetch(client: Any, version: int) -> int:
  newer = client.fetch(version)
  if newer is None and version < 0:
    raise transport.TransportError('the learner has no parameters yet')
  return version if newer is None else newer[0]


def main(argv: list[str]) -> int:
  """Argument: JSON with those of `Fleet`. Prints JSON. SIGUSR1: no more unrolls."""
  fleet = Fleet(**json.loads(argv[1]))
  signal.signal(signal.SIGUSR1, lambda *_: setattr(fleet, 'silent', True))
  fleet.run()
  print(json.dumps({'late': fleet.late, 'errors': fleet.errors}))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
