"""The pace is that of updates, whenever one looks."""

import pytest

from impala_jax.reporting import pace


def test_slow_updates_have_a_steady_pace():
  """One in 7 s, looked at every 2 s: it used to be 0 three times of four."""
  made = pace.Pace(2.0)
  found = []
  for second in range(100):
    if second % 7 == 0:
      made.note(second // 7, second)
    if second % 2 == 0:
      found.append(made.per_second(second))
  assert found[:3] == [None] * 3
  assert [x for x in found if x is not None] == pytest.approx([1 / 7] * 46)


def test_fast_updates_are_averaged_over_the_interval():
  made = pace.Pace(2.0)
  for i in range(1000):
    made.note(i, i / 100 if i < 500 else 5 + (i - 500) / 50)
  assert made.per_second(15.0) == pytest.approx(50.0)
  assert len(made._marks) < 110


def test_an_update_that_is_overdue_counts():
  made = pace.Pace(2.0)
  for i in range(6):
    made.note(i, float(i))
  assert made.per_second(7.0) == pytest.approx(1.0)
  assert made.per_second(50.0) == pytest.approx(4 / 49)
  assert made.idle(50.0) == 45.0


def test_one_update_is_no_look_ahead():
  made = pace.Pace(2.0)
  for i in range(5):
    assert not made.known
    made.note(i, float(i))
  assert made.known
