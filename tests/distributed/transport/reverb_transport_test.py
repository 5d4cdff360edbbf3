"""The Reverb transport: the contract, and what only separate processes can do."""

import contextlib
import gc
import sys
import threading
import time

import numpy as np
import pytest

from impala_jax.distributed.transport import protocol as transport
from tests.distributed.transport import network_contract
from tests.distributed.transport import transport_contract as contract

pytest.importorskip('reverb', reason='Reverb is not installed (latest set)')
from impala_jax.distributed.transport import reverb as reverb_transport
from impala_jax.distributed.transport import reverb_native

FORM = contract.layout()


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


class TestReverbTransport(contract.TransportContract, network_contract.NetworkContract):
  reader = reverb_transport.ReverbReader
  writer = reverb_transport.ReverbWriter


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
