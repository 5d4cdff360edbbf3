"""What is refused is counted by sender and told once a minute, in bounded memory."""

import logging

from impala_jax.runtime import refusals


def test_one_line_a_minute_names_senders_and_the_cause(caplog, monkeypatch):
  caplog.set_level(logging.WARNING)
  now = [100.0]
  monkeypatch.setattr(refusals.time, 'monotonic', lambda: now[0])
  door = refusals.Refusals('unrolls')
  for i in range(50):
    door.add(f'actor {i % 2}', 'its reward is NaN')
  (line,) = caplog.messages
  assert line.startswith('refused 1 unrolls so far (actor 0: 1); the last one')
  now[0] += 61
  door.add('actor 0', ValueError('x\nforged line\x1b[31m' + 'y' * 10_000))
  assert len(caplog.messages) == 2
  line = caplog.messages[1]
  assert line.startswith(
    'refused 51 unrolls so far (actor 0: 26, actor 1: 25); the last one, of actor 0: '
    'x?forged line?[31my'
  )
  assert len(line) < 500
  assert (door.total, door.by_sender()) == (51, {'actor 0': 26, 'actor 1': 25})


def test_senders_are_bounded(monkeypatch):
  monkeypatch.setattr(refusals, '_MOST_SENDERS', 3)
  door = refusals.Refusals('reports')
  for i in range(10):
    door.add(f'{i}' * 1000, 'no')
  assert door.total == 10
  assert max(map(len, door.by_sender())) < 100
  assert next(iter(door.by_sender().items())) == ('others', 7)
  assert door.in_words(1) == 'others: 7, all others: 3'
