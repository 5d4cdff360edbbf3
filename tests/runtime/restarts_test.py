"""The budget of restarts: its window, its pauses, and what it counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from impala_jax.runtime import restarts


def test_pauses_double_up_to_half_a_minute():
  budget = restarts.RestartBudget(8)
  assert [budget.spend(0.0) for _ in range(9)] == [1, 2, 4, 8, 16, 30, 30, 30, None]
  assert (budget.deaths, budget.restarts) == (9, 8)


def test_the_first_restart_may_be_at_once():
  budget = restarts.RestartBudget(3, at_once=True)
  assert [budget.spend(0.0) for _ in range(4)] == [0, 1, 2, None]


@pytest.mark.parametrize('at_once', [False, True])
def test_no_restart_is_allowed_where_none_is(at_once):
  assert restarts.RestartBudget(0, at_once=at_once).spend(0.0) is None


@given(st.lists(st.floats(0, 50), max_size=40), st.integers(0, 5))
def test_deaths_outside_the_window_are_forgotten(gaps, allowed):
  budget, now, deaths = restarts.RestartBudget(allowed, window=100.0), 0.0, []
  for gap in gaps:
    now += gap
    deaths.append(now)
    within = sum(now - d <= 100.0 for d in deaths)
    assert (budget.spend(now) is None) == (within > allowed)
    assert budget.deaths == within
