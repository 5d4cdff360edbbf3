"""What every transport promises; the tests of each run this whole suite."""

import contextlib
import threading
from typing import Any, NamedTuple

import numpy as np
import pytest

from impala_jax import types, unroll_layout
from impala_jax.distributed.transport import protocol as transport

BATCH = 4
# Seconds: long enough that a busy machine does not fail a test.
LONG = 30.0
GONE = (transport.Closed, transport.TransportError)


def layout(height: int = 8, width: int = 4, steps: int = 5):
  spec = types.EnvironmentSpec(
    observation=types.ArraySpec((height, width, 3), np.dtype(np.uint8)), num_actions=3
  )
  return unroll_layout.UnrollLayout(
    unroll_layout.unroll_spec(spec, agent_state=(), unroll_length=steps),
    spec.num_actions,
  )


def row(
  form: unroll_layout.UnrollLayout,
  sequence: int,
  actor: int = 0,
  incarnation: int = 0,
  version: int = 7,
) -> np.ndarray:
  """A sealed row with content of its own."""
  rng = np.random.default_rng([abs(sequence), actor, incarnation])
  data = form.allocate(1)[0]
  data[:] = 0
  views = form.views(data)
  observation = views.timestep.observation
  observation[...] = rng.integers(0, 256, observation.shape, dtype=np.uint8)
  views.timestep.reward[...] = rng.normal(size=views.timestep.reward.shape)
  form.seal(
    data,
    actor_id=actor,
    incarnation=incarnation,
    sequence=sequence,
    version=version,
  )
  return data


class Link(NamedTuple):
  """A reader, how to get a writer, and by how much the queue may exceed its size."""

  reader: Any
  writer: Any
  slack: int


def fill(writer: transport.Writer, form, limit: int = 200) -> int:
  """Writes rows 0, 1, … until the queue is full; returns how many went in."""
  for i in range(limit):
    try:
      writer.write(row(form, i), timeout=0.5)
    except TimeoutError:
      return i
  raise AssertionError(f'the queue took {limit} rows')


def read_rows(link: Link, number: int) -> list[np.ndarray]:
  """Copies of the next `number` rows (a multiple of the batch size)."""
  rows: list[np.ndarray] = []
  while len(rows) < number:
    batch = link.reader.read(LONG)
    assert batch.rows.shape == (BATCH, link.reader.layout.nbytes)
    assert batch.rows.ctypes.data % 64 == 0
    rows.extend(batch.rows.copy())
    batch.release()
  return rows


def sequences(link: Link, rows: list[np.ndarray], actor: int = 0) -> list[int]:
  headers = [link.reader.layout.header(r) for r in rows]
  return [int(h['sequence']) for h in headers if h['actor_id'] == actor]


class Call(threading.Thread):
  """Runs `f` in a thread and keeps what it raised."""

  def __init__(self, f):
    super().__init__(daemon=True)
    self._f = f
    self.error: BaseException | None = None
    self.start()

  def run(self):
    try:
      self._f()
    except BaseException as e:
      self.error = e

  def result(self) -> BaseException | None:
    self.join(LONG)
    assert not self.is_alive(), 'the call is still blocked'
    return self.error


class TransportContract:
  """Subclasses give the fixture `make`: (capacity) -> Link."""

  @pytest.fixture
  def link(self, make):
    return make(2 * BATCH)

  def test_rows_of_each_writer_arrive_whole_and_in_order(self, link):
    form = link.reader.layout
    count, actors = 20, 3

    def send(actor):
      with contextlib.closing(link.writer()) as writer:
        buffer = form.allocate(1)[0]
        for i in range(count):
          buffer[:] = row(form, i, actor)
          writer.write(buffer, LONG)
          buffer[:] = 0  # The writer may reuse its row at once.

    calls = [Call(lambda actor=actor: send(actor)) for actor in range(actors)]
    rows = read_rows(link, count * actors)
    for call in calls:
      assert call.result() is None
    for actor in range(actors):
      assert sequences(link, rows, actor) == list(range(count))
    for r in rows:
      h = form.header(r)
      expected = row(form, int(h['sequence']), int(h['actor_id']))
      np.testing.assert_array_equal(r, expected)
    stats = link.reader.stats()
    assert (stats.received, stats.queued) == (count * actors, 0)
    assert (stats.corrupted, stats.lost, stats.duplicated) == (0, 0, 0)

  def test_full_queue_holds_the_writer_back_and_loses_nothing(self, link):
    form = link.reader.layout
    writer = link.writer()
    accepted = fill(writer, form)
    stats = link.reader.stats()
    assert stats.capacity == 2 * BATCH
    assert stats.capacity <= accepted <= stats.capacity + link.slack
    assert stats.queued <= stats.capacity + link.slack
    # The same row again: late, but once.
    with pytest.raises(TimeoutError, match=r'full for 0\.1 s'):
      writer.write(row(form, accepted), timeout=0.1)
    rows = read_rows(link, BATCH)
    total = BATCH * 6
    sender = Call(
      lambda: [writer.write(row(form, i), LONG) for i in range(accepted, total)]
    )
    rows += read_rows(link, total - BATCH)
    assert sender.result() is None
    assert sequences(link, rows) == list(range(total))
    stats = link.reader.stats()
    assert (stats.lost, stats.duplicated) == (0, 0)

  def test_a_row_given_up_does_not_keep_the_next_from_going(self, link):
    form = link.reader.layout
    writer = link.writer()
    accepted = fill(writer, form)
    rows = read_rows(link, BATCH)
    for i in range(accepted + 1, accepted + 1 + 2 * BATCH):
      call = Call(lambda i=i: writer.write(row(form, i), LONG))
      with contextlib.suppress(TimeoutError):
        batch = link.reader.read(0.2)
        rows.extend(batch.rows.copy())
        batch.release()
      assert call.result() is None
    # Row `accepted` may come or not; all others come in order.
    got = [s for s in sequences(link, rows) if s != accepted]
    assert got == sorted(set(got))
    assert len(got) >= accepted
    assert set(range(accepted)) <= set(got)

  def test_held_batches_are_not_overwritten(self, link):
    form = link.reader.layout
    writer = link.writer()
    held = []
    for start in range(0, 3 * BATCH, BATCH):
      for i in range(start, start + BATCH):
        writer.write(row(form, i), LONG)
      held.append(link.reader.read(LONG))
    writer2 = link.writer()
    accepted = 0
    with contextlib.suppress(TimeoutError):
      while accepted < 200:
        writer2.write(row(form, accepted, actor=1), timeout=0.5)
        accepted += 1
    assert BATCH <= accepted < 100  # Memory is bounded.
    for i, batch in enumerate(held):
      for j in range(BATCH):
        np.testing.assert_array_equal(batch.rows[j], row(form, i * BATCH + j))
      batch.release()
      batch.release()  # Idempotent.
    rows = read_rows(link, BATCH)
    assert sequences(link, rows, actor=1) == list(range(BATCH))

  def test_read_times_out_and_keeps_what_came(self, link):
    form = link.reader.layout
    writer = link.writer()
    for i in range(BATCH - 1):
      writer.write(row(form, i), LONG)
    for _ in range(3):
      with pytest.raises(TimeoutError, match=f'of {BATCH} unrolls came within 0.4 s'):
        link.reader.read(0.4)
    writer.write(row(form, BATCH - 1), LONG)
    assert sequences(link, read_rows(link, BATCH)) == list(range(BATCH))

  def test_closing_the_reader_ends_a_blocked_read(self, link):
    call = Call(lambda: link.reader.read(10 * LONG))
    link.reader.close()
    assert isinstance(call.result(), transport.Closed)
    link.reader.close()  # Idempotent.
    with pytest.raises(transport.Closed):
      link.reader.read(LONG)

  def test_closing_the_reader_ends_a_blocked_write_with_an_error(self, link):
    form = link.reader.layout
    writer = link.writer()
    accepted = fill(writer, form)
    call = Call(lambda: writer.write(row(form, accepted), 10 * LONG))
    call.join(0.5)
    assert call.is_alive()
    link.reader.close()
    # Never a confirmation of a row that nobody will read.
    assert isinstance(call.result(), GONE)
    with pytest.raises(GONE):
      writer.write(row(form, accepted), 1.0)
    writer.close()

  def test_closing_the_writer_ends_a_blocked_write(self, link):
    form = link.reader.layout
    writer = link.writer()
    accepted = fill(writer, form)
    call = Call(lambda: writer.write(row(form, accepted), 10 * LONG))
    call.join(0.5)
    assert call.is_alive()
    writer.close()
    writer.close()  # Idempotent.
    assert isinstance(call.result(), transport.Closed)
    with pytest.raises(transport.Closed):
      writer.write(row(form, 0), 1.0)
    # Others go on.
    read_rows(link, BATCH)
    other = link.writer()
    for i in range(BATCH):
      call = Call(lambda i=i: other.write(row(form, i, actor=1), LONG))
      with contextlib.suppress(TimeoutError):
        link.reader.read(0.2).release()
      assert call.result() is None

  def test_wrong_rows_are_refused_at_write(self, link):
    form = link.reader.layout
    good = row(form, 0)
    n = form.nbytes
    writer = link.writer()
    for bad, what in (
      (good[:-1], rf'uint8\[{n - 1}\], expected uint8\[{n}\]'),
      (good.reshape(1, -1), rf'uint8\[1, {n}\], expected'),
      (good.view(np.int8), r'int8\['),
      (good.astype(np.float32), r'float32\['),
    ):
      with pytest.raises(ValueError, match=what):
        writer.write(bad, 1.0)
    for i in range(BATCH):
      writer.write(row(form, i), LONG)
    assert sequences(link, read_rows(link, BATCH)) == list(range(BATCH))

  def test_bad_rows_are_counted_and_batches_stay_full(self, link):
    form = link.reader.layout
    steps, height, width, _ = next(f.shape for f in form.fields if len(f.shape) == 4)
    other = layout(width, height, steps - 1)
    assert other.nbytes == form.nbytes
    assert other.fingerprint != form.fingerprint
    flipped = row(form, 2)
    flipped[form.nbytes - 1] ^= 1
    flipped_header = row(form, 6)
    form.header(flipped_header)['sequence'] = 600
    bad = {0: row(other, 0), 2: flipped, 6: flipped_header, 7: np.zeros_like(flipped)}
    total = 3 * BATCH + len(bad)
    writer = link.writer()
    sender = Call(
      lambda: [writer.write(bad.get(i, row(form, i)), LONG) for i in range(total)]
    )
    rows = read_rows(link, 3 * BATCH)
    assert sender.result() is None
    assert sequences(link, rows) == [i for i in range(total) if i not in bad]
    for r in rows:
      np.testing.assert_array_equal(r, row(form, int(form.header(r)['sequence'])))
    stats = link.reader.stats()
    assert stats.corrupted == len(bad)
    assert stats.received == 3 * BATCH
    assert stats.lost == 3  # Row 0 came before counting could begin.

  def test_gaps_and_repetitions_are_counted_per_writer(self, link):
    form = link.reader.layout
    writer = link.writer()
    sent = [(0, 0), (0, 1), (0, 1), (0, 5), (1, 100), (1, 101), (0, 5), (0, 6),
            (1, 103), (1, 104)]  # fmt: skip
    sender = Call(lambda: [writer.write(row(form, s, actor=a), LONG) for a, s in sent])
    rows = read_rows(link, 2 * BATCH)
    assert sender.result() is None
    assert sequences(link, rows, 0) == [0, 1, 5, 6]
    assert sequences(link, rows, 1) == [100, 101, 103, 104]
    stats = link.reader.stats()
    assert (stats.lost, stats.duplicated, stats.received) == (4, 2, 8)
    stats.lost = 99
    assert link.reader.stats().lost == 4  # It was a copy.
    by_actor = {w.actor: w for w in link.reader.writers()}
    assert by_actor.keys() == {0, 1}
    for actor, first, after, lost in ((0, 0, 7, 3), (1, 100, 105, 1)):
      found = by_actor[actor]
      assert (found.first, found.next, found.received) == (first, after, 4)
      assert (found.lost, found.stale) == (lost, 0)
    by_actor[0].lost = 99
    assert {w.lost for w in link.reader.writers()} == {3, 1}

  def test_old_rows_are_refused_counted_and_replaced_by_newer(self, link):
    form = link.reader.layout
    writer = link.writer()

    def send(numbers, versions):
      for i in numbers:
        writer.write(row(form, i, version=versions[i % len(versions)]), LONG)

    link.reader.refuse_older(10)
    sender = Call(lambda: send(range(4 * BATCH), versions=[9, 10, 3, 11]))
    rows = read_rows(link, 2 * BATCH)
    assert sender.result() is None
    assert sequences(link, rows) == list(range(1, 4 * BATCH, 2))
    stats = link.reader.stats()
    assert (stats.stale, stats.received, stats.queued) == (2 * BATCH, 2 * BATCH, 0)
    # They came: nothing is lost.
    assert (stats.lost, stats.duplicated, stats.corrupted) == (0, 0, 0)

    link.reader.refuse_older(11)
    sender = Call(lambda: send(range(4 * BATCH, 6 * BATCH), versions=[10, 12]))
    rows = read_rows(link, BATCH)
    assert sender.result() is None
    assert sequences(link, rows) == list(range(4 * BATCH + 1, 6 * BATCH, 2))
    assert link.reader.stats().stale == 3 * BATCH

  @pytest.mark.parametrize(
    'forged',
    [
      [2**62],
      [2**40, 2**41, 2**42],
      [-1, -(2**62)],
      [200],  # So far an actor may have got.
      [256, 512],
      [2**30, 2**30 + 1, 2**30 + 2, 2**30 + 3],
      [n << 20 for n in range(1, 40)],
    ],
  )
  @pytest.mark.parametrize('before', [0, 2])
  def test_no_forged_number_silences_an_actor(self, make, forged, before):
    link = make(16 * BATCH)
    form, count = link.reader.layout, 12 * BATCH
    numbers = [*range(before), *forged, *range(before, count + BATCH)]
    writer = link.writer()
    sender = Call(lambda: [writer.write(row(form, n), LONG) for n in numbers])
    honest: list[int] = []
    while count - 1 not in honest:
      honest += [n for n in sequences(link, read_rows(link, BATCH)) if n not in forged]
    assert sender.result() is None
    # At most two after a number that the writer may have had: then it is believed.
    missing = set(range(count)).difference(honest)
    assert missing <= {before, before + 1}
    assert honest == sorted(honest)
    stats = link.reader.stats()
    assert stats.duplicated == 0
    assert 0 <= stats.lost < 1024
    assert stats.refused >= len(missing)
    for w in link.reader.writers():
      assert w.next - w.first == w.received + w.lost + w.stale + w.refused
    assert link.reader.refusals.total == stats.refused
    assert set(link.reader.refusals.by_sender()) <= {'actor 0'}

  def test_a_writer_that_is_really_elsewhere_is_followed(self, link):
    form = link.reader.layout
    numbers = [*range(6), *range(5000, 5012)]
    writer = link.writer()
    sender = Call(lambda: [writer.write(row(form, n), LONG) for n in numbers])
    rows = read_rows(link, 4 * BATCH)
    assert sender.result() is None
    assert sequences(link, rows) == [*range(6), *range(5002, 5012)]
    stats = link.reader.stats()
    assert (stats.refused, stats.lost, stats.duplicated) == (2, 0, 0)

  def test_versions_that_nobody_can_have_are_refused(self, link):
    form = link.reader.layout
    writer = link.writer()
    link.reader.refuse_newer(7)
    versions = [7, 8, 2**62, 6, -1, -(2**62), 7, 0]
    sender = Call(
      lambda: [
        writer.write(row(form, i, version=v), LONG) for i, v in enumerate(versions)
      ]
    )
    rows = read_rows(link, BATCH)
    assert sender.result() is None
    assert sequences(link, rows) == [0, 3, 6, 7]
    stats = link.reader.stats()
    # They came: nothing is lost.
    assert (stats.refused, stats.lost, stats.received) == (4, 0, BATCH)
    assert link.reader.refusals.by_sender() == {'actor 0': 4}
    (seen,) = link.reader.writers()
    assert (seen.refused, seen.next - seen.first) == (4, 8)

  def test_what_no_actor_can_have_meant_is_refused_alone(self, link):
    form = link.reader.layout
    nan, inf = float('nan'), float('inf')
    spoilt = [
      ('timestep.reward', nan),
      ('timestep.reward', -inf),
      ('timestep.reward', 1e30),
      ('timestep.discount', inf),
      ('timestep.discount', 1.5),
      ('timestep.discount', -0.1),
      ('timestep.step_type', 3),
      ('behaviour_log_prob', nan),
      ('behaviour_log_prob', -inf),
      ('action', 3),
      ('action', -1),
      ('last_action', 2**31 - 1),
      ('task_id', -1),
    ]
    bad = {}
    for i, (name, value) in enumerate(spoilt):
      bad[2 * i] = row(form, 2 * i, actor=i % 3)
      field = next(f for f in form.fields if f.name == name)
      part = bad[2 * i][field.offset : field.offset + field.nbytes].view(field.dtype)
      part[-1] = value
      form.seal(bad[2 * i], actor_id=i % 3, incarnation=0, sequence=2 * i, version=7)
    total = 2 * len(spoilt) + 3
    writer = link.writer()
    sender = Call(
      lambda: [writer.write(bad.get(i, row(form, i, 9)), LONG) for i in range(total)]
    )
    rows = read_rows(link, (total - len(bad)) // BATCH * BATCH)
    assert sender.result() is None
    assert sequences(link, rows, 9) == [i for i in range(total) if i not in bad]
    stats = link.reader.stats()
    assert (stats.refused, stats.corrupted) == (len(bad), 0)
    assert link.reader.refusals.by_sender() == {
      'actor 0': 5,
      'actor 1': 4,
      'actor 2': 4,
    }

  def test_impossible_sizes_are_refused(self, make):
    with pytest.raises(ValueError, match=r'capacity is 3: must be at least.*\(4\)'):
      make(BATCH - 1)
