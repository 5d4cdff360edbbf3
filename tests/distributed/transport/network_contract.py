"""What every transport between processes promises, beside `transport_contract`."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from impala_jax.distributed.transport import protocol as transport
from tests.distributed.transport import transport_contract as contract

FORM = contract.layout()

_PRELUDE = """
import sys, time
import numpy as np
from impala_jax.distributed.transport import protocol as transport
from tests.distributed.transport import transport_contract as contract
FORM = contract.layout()
"""
# Prints the sequence numbers that it reads, then its counts.
_LEARNER = """
reader = Reader(FORM, 4, 8, port=int(sys.argv[1]))
print('port', reader.port, flush=True)
while True:
  batch = reader.read(300.0)
  stats = reader.stats()
  print('read', *FORM.header(batch.rows)['sequence'], stats.duplicated, flush=True)
  batch.release()
"""
# Writes without end.
_ACTOR = """
writer = Writer(sys.argv[1], FORM)
for i in range(10**9):
  writer.write(contract.row(FORM, i, actor=3), 60.0)
"""
_BOTH = """
writer = Writer(sys.argv[1], FORM, 1.0)
try:
  writer.write(contract.row(FORM, 0), 1.0)
except transport.TransportError:
  pass
print('light', flush=True)
reader = Reader(FORM, 4, 8)
writer = Writer(reader.address, FORM)
for i in range(4):
  writer.write(contract.row(FORM, i), 10.0)
assert reader.read(10.0).rows.shape == (4, FORM.nbytes)
assert 'tensorflow' not in sys.modules
print('both', flush=True)
"""


def _patiently(write, seconds: float = 60.0) -> None:
  """Repeats `write` while the learner is out of reach, as an actor does."""
  end = time.monotonic() + seconds
  while True:
    try:
      return write()
    except (transport.TransportError, TimeoutError):
      if time.monotonic() > end:
        raise


class NetworkContract:
  """Subclasses give `reader` and `writer`, classes, and the fixture `make`."""

  @pytest.fixture
  def run(self):
    """Starts Python processes; whatever happens they are gone afterwards."""
    children = []

    def run(code, *args):
      environment = {**os.environ, 'XLA_FLAGS': '', 'TF_CPP_MIN_LOG_LEVEL': '3'}
      child = subprocess.Popen(
        [sys.executable, '-c', self._code(code), *map(str, args)],
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

  def _code(self, text):
    """`text` for a process of its own."""
    imports = [
      f'from {found.__module__} import {found.__name__} as {name}\n'
      for name, found in (('Reader', self.reader), ('Writer', self.writer))
    ]
    return _PRELUDE + ''.join(imports) + text

  def test_a_port_in_use_is_refused(self, make):
    link = make(8)
    with pytest.raises(OSError, match=f'port {link.reader.port} is in use'):
      self.reader(FORM, 4, 8, port=link.reader.port)
    with socket.socket() as other:
      other.bind(('', 0))
      other.listen()
      port = other.getsockname()[1]
      with pytest.raises(OSError, match=f'port {port} is in use'):
        self.reader(FORM, 4, 8, port=port)
    link.reader.close()
    again = self.reader(FORM, 4, 8, port=link.reader.port)
    again.close()
    with pytest.raises(ValueError, match='port is 65536'):
      self.reader(FORM, 4, 8, port=65536)

  def test_rows_of_another_size_are_refused(self, make):
    link = make(8)
    other = contract.layout(16, 16)
    writer = self.writer(link.reader.address, other)
    with pytest.raises(ValueError, match='another network, unroll length'):
      writer.write(contract.row(other, 0), 1.0)
    writer.close()

  def test_nobody_at_the_address(self):
    with socket.socket() as unused:
      unused.bind(('', 0))
      port = unused.getsockname()[1]
      writer = self.writer(f'localhost:{port}', FORM, 1.0)
      for _ in range(2):
        with pytest.raises(transport.TransportError, match=f'{port} is out of reach'):
          writer.write(contract.row(FORM, 0), 1.0)
      writer.close()
    with pytest.raises(ValueError, match='connect_timeout is 0'):
      self.writer('localhost:1', FORM, 0)

  def test_a_writer_killed_at_work_costs_no_whole_row(self, make, run):
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

  def test_learner_frozen_killed_and_restarted(self, run):
    learner = run(_LEARNER, 0)
    port = int(learner.stdout.readline().split()[1])
    writer = self.writer(f'localhost:{port}', FORM, 2.0)

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

  def test_nothing_needs_tensorflow_and_a_reader_ends_by_itself(self, run):
    child = run(_BOTH, 'localhost:9')
    assert child.stdout.read().split() == ['light', 'both']
    assert child.wait(30) == 0  # Neither hangs nor crashes without `close`.
