"""The arithmetic of the soak: growth, halts, and where unrolls went."""

import numpy as np
import pytest

from experiments.soak import checks as soak_checks
from experiments.soak import run as soak_run
from experiments.soak.checks import Seen


def life(pid, slope, level=100.0, seconds=600, born=0.0, start=0.0):
  """Samples every 5 s of a process whose figure grows by `slope` an hour."""
  return [
    {'pid': pid, 'born': born, 'time': born + t, 'mb': level + slope * t / 3600}
    for t in np.arange(start, seconds, 5.0)
  ]


def test_slope_is_that_within_lives_not_between_them():
  # Later lives begin higher: that is no growth.
  samples = life(1, 30, 100) + life(2, 30, 500, born=700) + life(3, 30, 900, born=1400)
  slope = soak_checks.slope_per_hour(samples, 'mb')
  assert slope['per_hour'] == pytest.approx(30)
  assert slope['processes'] == 3
  assert slope['hours'] == pytest.approx(3 * 535 / 3600)


def test_slope_leaves_out_the_beginning_and_survives_outliers():
  rng = np.random.default_rng(0)
  samples = life(1, 12, seconds=3600)
  for sample in samples:
    if sample['time'] < 60:
      sample['mb'] = 10 * sample['time']  # It loads and compiles.
    elif rng.random() < 0.1:
      sample['mb'] += 500  # A checkpoint is written.
  slope = soak_checks.slope_per_hour(samples, 'mb')
  assert slope['per_hour'] == pytest.approx(12, abs=3)
  all_of_it = soak_checks.slope_per_hour(life(1, 12, seconds=50), 'mb', warm_up=0)
  assert all_of_it['per_hour'] == pytest.approx(12)


def test_a_number_used_again_is_another_process():
  samples = life(1, 0, 100) + life(1, 0, 900, born=5000)
  slope = soak_checks.slope_per_hour(samples, 'mb')
  assert slope['per_hour'] == 0
  assert slope['processes'] == 2


def test_no_slope_without_two_samples_after_the_warm_up():
  assert soak_checks.slope_per_hour(life(1, 5, seconds=64), 'mb') is None
  assert soak_checks.slope_per_hour([], 'mb') is None


def test_halts_name_their_faults():
  halts = soak_checks.halts(
    [10, 11, 12, 40, 41], [(12.5, 'kill a'), (30, 'kill b'), (60, 'kill c')], 9, 45
  )
  assert halts[0] == {'seconds': 28, 'at': 3, 'faults': ['kill a', 'kill b']}
  assert halts[1] == {'seconds': 4, 'at': 32, 'faults': ['kill b']}


def test_a_run_that_never_goes_on_is_one_halt_to_the_end():
  halts = soak_checks.halts([10, 11], [(11.5, 'kill')], 10, 100)
  assert halts[0]['seconds'] == 89
  assert halts[0]['faults'] == ['kill']


def adds_up(result):
  return result['sent'] == (
    result['received']
    + result['stale']
    + result['lost']
    + result['gone']
    - result['repeated']
    + result['unheard']
  )


def test_unrolls_of_one_learner():
  ledger = {(0, 5): Seen(0, 100, 97, 2, 1), (1, 5): Seen(0, 50, 50, 0, 0)}
  result = soak_checks.balance([ledger], {(0, 5): 100, (1, 5): 53})
  assert result['sent'] == 153
  assert result['received'] == 147
  assert (result['lost'], result['stale'], result['unheard']) == (2, 1, 3)
  assert result['gone'] == result['repeated'] == 0
  assert result['unbalanced'] == []
  assert adds_up(result)


def test_unrolls_over_learners_that_died():
  ledgers = [
    {(0, 0): Seen(0, 100, 100, 0, 0), (1, 0): Seen(0, 80, 80, 0, 0)},
    # Of actor 0 twelve went with the learner; actor 1 sent its last one again; actor 2
    # had sent three before the first learner counted any.
    {
      (0, 0): Seen(112, 150, 38, 0, 0),
      (1, 0): Seen(79, 90, 11, 0, 0),
      (2, 0): Seen(3, 10, 7, 0, 0),
    },
    # Another process of actor 1 begins anew.
    {(0, 0): Seen(150, 160, 10, 0, 0), (1, 1): Seen(0, 20, 20, 0, 0)},
  ]
  reported = {(0, 0): 158, (1, 0): 95, (1, 1): 20, (2, 0): 10, (3, 0): 4}
  result = soak_checks.balance(ledgers, reported)
  assert result['gone'] == 15
  assert result['most_gone_of_one_actor'] == 12
  assert result['repeated'] == 1
  assert result['unheard'] == 5 + 4  # Of actor 3 nothing ever came.
  assert result['sent'] == 160 + 95 + 20 + 10 + 4
  assert result['actor_processes'] == 5
  assert adds_up(result)


def test_counts_that_contradict_each_other_are_told():
  result = soak_checks.balance([{(0, 0): Seen(0, 100, 90, 2, 0)}], {})
  assert len(result['unbalanced']) == 1
  assert 'actor 0, incarnation 0' in result['unbalanced'][0]


def test_updates_redone():
  records = [{'updates': n} for n in (0, 5, 9, 4, 8, 8, 7)]
  assert soak_checks.updates_redone(records) == [5, 1]


def test_faults_come_from_the_seed_within_their_bounds():
  faults = soak_run.schedule(3, 3600, 45, 120, 2, 1000)
  assert faults == soak_run.schedule(3, 3600, 45, 120, 2, 1000)
  assert faults != soak_run.schedule(4, 3600, 45, 120, 2, 1000)
  times = [f.at for f in faults]
  assert times == sorted(times)
  assert times[-1] < 3600 - 120
  assert 3600 / 45 / 2 < len(times) < 3600 / 45 * 2
  names = {f.replica.name for f in faults}
  assert names == {'learner-0', 'learner-1', 'actor-1', 'actor-2', 'evaluator-0'}
  strangers = {'forge', 'damage', 'launch'}
  kinds = {'kill', 'orphan', 'freeze', 'terminate'} | strangers
  assert {f.kind for f in faults} == kinds
  assert {f.replica.name for f in faults if f.kind in strangers} == {'learner-0'}
  assert len(soak_run.schedule(3, 3600, 45, 120, 1, 7)) == 7
