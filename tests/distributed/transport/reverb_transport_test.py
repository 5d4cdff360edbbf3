"""The Reverb transport: the contract, and what only separate processes can do."""

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from impala_jax.distributed.transport import protocol as transport
from tests.distributed.transport import transport_contract as contract

pytest.importorskip('reverb', reason='Reverb is not installed (latest set)')
from impala_jax.distributed.transport import reverb as reverb_transport
from impala_jax.distributed.transport import reverb_native

FORM = contract.layout()

_PRELUDE = """
import sys, time
import numpy as np
from impala_jax.distributed.transport import protocol as transport
from impala_jax.distributed.transport import reverb as reverb_transport
from tests.distributed.transport import transport_contract as contract
FORM = contract.layout()
"""
# Prints the sequence numbers that it reads, then its counts.
_LEARNER = (
  _PRELUDE
  + """
reader = reverb_transport.ReverbReader(FORM, 4, 8, port=int(sys.argv[1]))
print('port', reader.port, flush=True)
while True:
  batch = reader.read(300.0)
  stats = reader.stats()
  print('read', *FORM.header(batch.rows)['sequence'], stats.duplicated, flush=True)
  batch.release()
"""
)
# Writes without end.
_ACTOR = (
  _PRELUDE
  + """
writer = reverb_transport.ReverbWriter(sys.argv[1], FORM)
for i in range(10**9):
  writer.write(contract.row(FORM, i, actor=3), 60.0)
"""
)


@pytest.fixture
def run():
  """Starts Python processes; whatever happens they are gone afterwards."""
  children = []

  def run(code, *args):
    environment = {**os.environ, 'XLA_FLAGS': '', 'TF_CPP_MIN_LOG_LEVEL': '3'}
    child = subprocess.Popen(
      [sys.executable, '-c', code, *map(str, args)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )
    children.append(child)
    return child

  yield run
  for child in children:
    child.kill()
    child.wait(10)
    child.stdout.close()


@pytest.fixture
def make():
  with contextlib.ExitStack() as stack:

    def make(capacity):
      reader = reverb_transport.ReverbReader(FORM, contract.BATCH, capacity)
      stack.callback(reader.close)

      def writer():
        made = reverb_transport.ReverbWriter(reader.address, FORM, connect_timeout=3.0)
        stack.callback(made.close)
        return made

      return contract.Link(reader, writer, slack=5)

    yield make


class TestReverbTransport(contract.TransportContract):
  pass


def test_a_reader_that_sleeps_on_is_asked_anew(make, monkeypatch):
  link = make(8)
  monkeypatch.setattr(reverb_transport, '_ASLEEP', 0.5)
  take, slept = link.reader._server.take, threading.Event()

  def sleep_once():
    if slept.is_set():
      return take()
    slept.set()
    link.reader._closed.wait()
    return iter(())

  def read_batch():
    end = time.monotonic() + contract.LONG
    while True:
      try:
        batch = link.reader.read(0.1)
      except TimeoutError:
        assert time.monotonic() < end
        continue
      found = contract.sequences(link, batch.rows)
      batch.release()
      return found

  monkeypatch.setattr(link.reader._server, 'take', sleep_once)
  assert slept.wait(contract.LONG)
  writer = link.writer()
  for start in (0, 4):
    for i in range(start, start + 4):
      writer.write(contract.row(FORM, i), contract.LONG)
    assert read_batch() == list(range(start, start + 4))
    assert link.reader._asked == 2  # The second time was enough.


def test_items_that_are_no_rows_are_refused(make):
  link = make(8)
  writer = link.writer()
  table = f'unrolls_{FORM.nbytes}'
  for i in range(4):
    writer.write(contract.row(FORM, i), contract.LONG)
  assert contract.sequences(link, contract.read_rows(link, 4)) == [0, 1, 2, 3]
  strange = (
    np.zeros(FORM.nbytes + 1, np.uint8),
    np.zeros(FORM.nbytes, np.float32),
    np.zeros(FORM.nbytes, np.uint8),  # No header.
  )
  for count, bad in enumerate(strange[:2], start=1):
    stranger = reverb_native.Connection(link.reader.address)
    stranger.send(table, bad)
    assert stranger.flush(contract.LONG)
    stranger.close()
    end = time.monotonic() + contract.LONG
    while link.reader.stats().corrupted < count and time.monotonic() < end:
      time.sleep(0.02)
    assert link.reader.stats().corrupted == count
  writer.write(strange[2], contract.LONG)
  sender = contract.Call(
    lambda: [writer.write(contract.row(FORM, i), contract.LONG) for i in range(4, 16)]
  )
  rows = contract.read_rows(link, 12)
  assert sender.result() is None
  assert contract.sequences(link, rows) == list(range(4, 16))
  stats = link.reader.stats()
  assert (stats.corrupted, stats.received, stats.lost) == (3, 16, 0)


def test_rows_leave_nothing_behind(make):
  # TensorFlow's datasets leave a small object of Python's for each tensor.
  link = make(8)
  writer = link.writer()

  def move(first, last):
    def send():
      for i in range(first, last):
        writer.write(contract.row(FORM, i), contract.LONG)

    sender = contract.Call(send)
    for _ in range((last - first) // contract.BATCH):
      link.reader.read(contract.LONG).release()
    assert sender.result() is None
    gc.collect()
    return sys.getallocatedblocks()

  before = move(0, 200)
  assert move(200, 1200) - before < 500


def test_a_failure_of_reverb_reaches_the_learner(make, monkeypatch):
  link = make(8)

  def broken():
    raise RuntimeError('broken')

  monkeypatch.setattr(link.reader._server, 'take', broken)
  with pytest.raises(transport.TransportError, match='reading from Reverb failed'):
    link.reader.read(contract.LONG)


def test_a_port_in_use_is_refused(make):
  link = make(8)
  with pytest.raises(OSError, match=f'port {link.reader.port} is in use'):
    reverb_transport.ReverbReader(FORM, 4, 8, port=link.reader.port)
  with socket.socket() as other:
    other.bind(('', 0))
    other.listen()
    port = other.getsockname()[1]
    with pytest.raises(OSError, match=f'port {port} is in use'):
      reverb_transport.ReverbReader(FORM, 4, 8, port=port)
  link.reader.close()
  again = reverb_transport.ReverbReader(FORM, 4, 8, port=link.reader.port)
  again.close()
  with pytest.raises(ValueError, match='port is 65536'):
    reverb_transport.ReverbReader(FORM, 4, 8, port=65536)


def test_rows_of_another_size_are_refused(make):
  link = make(8)
  other = contract.layout(16, 16)
  writer = reverb_transport.ReverbWriter(link.reader.address, other)
  with pytest.raises(ValueError, match='another network, unroll length'):
    writer.write(contract.row(other, 0), 1.0)
  writer.close()


def test_nobody_at_the_address():
  with socket.socket() as unused:
    unused.bind(('', 0))
    port = unused.getsockname()[1]
    writer = reverb_transport.ReverbWriter(f'localhost:{port}', FORM, 1.0)
    for _ in range(2):
      with pytest.raises(transport.TransportError, match=f'{port} is out of reach'):
        writer.write(contract.row(FORM, 0), 1.0)
    writer.close()
  with pytest.raises(ValueError, match='connect_timeout is 0'):
    reverb_transport.ReverbWriter('localhost:1', FORM, 0)


def test_a_writer_killed_at_work_costs_no_whole_row(make, run):
  link = make(8)
  child = run(_ACTOR, link.reader.address)
  rows = contract.read_rows(link, 40)
  child.send_signal(signal.SIGKILL)
  child.wait(10)
  writer = link.writer()
  sender = contract.Call(
    lambda: [
      writer.write(contract.row(FORM, i, actor=5), contract.LONG) for i in range(40)
    ]
  )
  while len(contract.sequences(link, rows, 5)) < 37:
    rows += contract.read_rows(link, 4)
  assert sender.result() is None
  killed = contract.sequences(link, rows, 3)
  assert killed == list(range(len(killed)))
  alive = contract.sequences(link, rows, 5)
  assert alive == list(range(len(alive)))
  stats = link.reader.stats()
  assert (stats.corrupted, stats.lost, stats.duplicated) == (0, 0, 0)


def _patiently(write, seconds: float = 60.0) -> None:
  """Repeats `write` while the learner is out of reach, as an actor does."""
  end = time.monotonic() + seconds
  while True:
    try:
      return write()
    except (transport.TransportError, TimeoutError):
      if time.monotonic() > end:
        raise


def test_learner_frozen_killed_and_restarted(run):
  learner = run(_LEARNER, 0)
  port = int(learner.stdout.readline().split()[1])
  writer = reverb_transport.ReverbWriter(f'localhost:{port}', FORM, 2.0)

  def send(sequences):
    for i in sequences:
      _patiently(lambda i=i: writer.write(contract.row(FORM, i), 1.0))

  send(range(4))
  assert learner.stdout.readline().split() == ['read', '0', '1', '2', '3', '0']

  # Frozen: the kernel still accepts connections and bytes.
  learner.send_signal(signal.SIGSTOP)
  os.waitpid(learner.pid, os.WUNTRACED)  # All its threads have stopped.
  before = time.monotonic()
  with pytest.raises(transport.TransportError, match='out of reach'):
    writer.write(contract.row(FORM, 4), 1.0)
  assert time.monotonic() - before < 30.0
  learner.send_signal(signal.SIGCONT)
  send(range(4, 8))
  read = learner.stdout.readline().split()
  assert read[:5] == ['read', '4', '5', '6', '7']
  assert read[5] in '01'  # Row 4 may have come twice; it was handed on once.

  learner.send_signal(signal.SIGKILL)
  learner.wait(10)
  before = time.monotonic()
  for _ in range(2):
    with pytest.raises(transport.TransportError, match='out of reach'):
      writer.write(contract.row(FORM, 8), 1.0)
  assert time.monotonic() - before < 30.0

  learner = run(_LEARNER, port)
  assert learner.stdout.readline().split() == ['port', str(port)]
  send(range(8, 12))
  assert learner.stdout.readline().split() == ['read', '8', '9', '10', '11', '0']
  writer.close()


def test_nothing_needs_tensorflow_and_a_reader_ends_by_itself(run):
  code = (
    _PRELUDE
    + """
writer = reverb_transport.ReverbWriter(sys.argv[1], FORM, 1.0)
try:
  writer.write(contract.row(FORM, 0), 1.0)
except transport.TransportError:
  pass
print('light', flush=True)
reader = reverb_transport.ReverbReader(FORM, 4, 8)
writer = reverb_transport.ReverbWriter(reader.address, FORM)
for i in range(4):
  writer.write(contract.row(FORM, i), 10.0)
assert reader.read(10.0).rows.shape == (4, FORM.nbytes)
assert 'tensorflow' not in sys.modules
print('both', flush=True)
"""
  )
  child = run(code, 'localhost:9')
  assert child.stdout.read().split() == ['light', 'both']
  assert child.wait(30) == 0  # Neither hangs nor crashes without `close`.
