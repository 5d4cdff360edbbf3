"""The local transport: the contract, and any order of operations."""

import collections

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from impala_jax.distributed.transport import local as local_transport
from impala_jax.distributed.transport import protocol as transport
from tests.distributed.transport import transport_contract as contract

FORM = contract.layout()


class TestLocalTransport(contract.TransportContract):
  @pytest.fixture
  def make(self):
    made = []

    def make(capacity):
      reader = local_transport.LocalTransport(FORM, contract.BATCH, capacity)
      made.append(reader)
      return contract.Link(reader, reader.writer, slack=0)

    yield make
    for reader in made:
      reader.close()


def test_batch_size_must_be_positive():
  with pytest.raises(ValueError, match='batch_size is 0'):
    local_transport.LocalTransport(FORM, 0, 4)


def test_a_write_that_fails_half_way_is_refused_by_the_reader(monkeypatch):
  """The slab still holds an older row there, whose checksum is right."""
  queue = local_transport.LocalTransport(FORM, 1, 1)
  writer = queue.writer()
  for i in range(10):  # All slabs were used once.
    writer.write(contract.row(FORM, i), 1.0)
    queue.read(1.0).release()

  def fail(target, source):
    raise MemoryError

  with monkeypatch.context() as patch:
    patch.setattr(np, 'copyto', fail)
    with pytest.raises(MemoryError):
      writer.write(contract.row(FORM, 10), 1.0)
  with pytest.raises(TimeoutError):
    queue.read(0.01)
  stats = queue.stats()
  assert (stats.corrupted, stats.duplicated, stats.queued) == (1, 0, 0)


def test_rows_move_after_a_refused_one_until_the_queue_runs_empty(monkeypatch):
  queue = local_transport.LocalTransport(FORM, 4, 16)
  writer = queue.writer()
  copies = []
  copy = np.copyto
  monkeypatch.setattr(np, 'copyto', lambda *x: (copies.append(1), copy(*x)))

  def moved(number):
    """Rows moved while `number` batches are read."""
    before = len(copies)
    for _ in range(number):
      queue.read(1.0).release()
    return len(copies) - before

  rows = [contract.row(FORM, i) for i in range(17)]
  rows[1][-1] ^= 1
  for row in rows[:13]:
    writer.write(row, 1.0)
  assert moved(3) == 3 + 4 + 4
  for row in rows[13:]:
    writer.write(row, 1.0)
  assert moved(1) == 0


@hypothesis.given(
  batch=st.integers(1, 4),
  extra=st.integers(0, 5),
  actions=st.lists(st.sampled_from(['write', 'bad', 'read', 'release']), max_size=60),
)
@hypothesis.settings(max_examples=150, deadline=None)
def test_any_order_of_operations_equals_a_list(batch, extra, actions):
  capacity = batch + extra
  queue = local_transport.LocalTransport(FORM, batch, capacity)
  writer = queue.writer()
  waiting: collections.deque[int | None] = collections.deque()  # None: corrupted.
  sound: list[int] = []  # Taken, for the next batch.
  held: list[tuple[transport.Batch, list[int]]] = []
  corrupted = 0
  for i, action in enumerate(actions):
    if action in ('write', 'bad'):
      data = contract.row(FORM, i)
      if action == 'bad':
        data[-1] ^= 1
      if len(waiting) + len(sound) < capacity:
        writer.write(data, 0.0)
        waiting.append(i if action == 'write' else None)
      else:
        with pytest.raises(TimeoutError):
          writer.write(data, 0.0)
    elif action == 'read' and len(held) < 3:
      while len(sound) < batch <= len(sound) + len(waiting):
        for _ in range(batch - len(sound)):
          item = waiting.popleft()
          if item is None:
            corrupted += 1
          else:
            sound.append(item)
      if len(sound) == batch:
        held.append((queue.read(0.0), sound))
        sound = []
      else:
        with pytest.raises(TimeoutError):
          queue.read(0.0)
    elif action == 'release' and held:
      held.pop(0)[0].release()
    for result, expected in held:
      got = FORM.header(result.rows)['sequence'].tolist()
      assert got == expected
    stats = queue.stats()
    assert stats.queued == len(waiting) + len(sound)
    assert stats.corrupted == corrupted
