"""Scores against a table of cases whose answers are known from the definition."""

import pytest

from impala_jax.environments.dmlab import levels as dmlab30

_RANDOM = {x.test: x.random for x in dmlab30.LEVELS}
_HUMAN = {x.test: x.human for x in dmlab30.LEVELS}
_MIDDLE = {x.test: (x.random + x.human) / 2 for x in dmlab30.LEVELS}


def _by_training_name(returns):
  return {x.train: returns[x.test] for x in dmlab30.LEVELS}


def _scored(target):
  """The returns that give each level the score `target(index)`."""
  return {
    x.test: x.random + (x.human - x.random) * target(i) / 100
    for i, x in enumerate(dmlab30.LEVELS)
  }


def test_the_levels():
  assert len(dmlab30.LEVELS) == len(set(dmlab30.TEST_LEVELS)) == 30
  assert len(set(dmlab30.TRAINING_LEVELS)) == 30
  held_out = {x.train: x.test for x in dmlab30.LEVELS if x.train != x.test}
  assert held_out == {
    'rooms_collect_good_objects_train': 'rooms_collect_good_objects_test',
    'rooms_exploit_deferred_effects_train': 'rooms_exploit_deferred_effects_test',
  }
  families = [name.split('_')[0] for name in dmlab30.TEST_LEVELS]
  assert {f: families.count(f) for f in families} == {
    'rooms': 5, 'language': 4, 'lasertag': 4, 'natlab': 3, 'skymaze': 2,
    'psychlab': 4, 'explore': 8,
  }  # fmt: skip
  assert all(x.random < x.human for x in dmlab30.LEVELS)


@pytest.mark.parametrize(
  ('level', 'random', 'human'),
  [
    ('rooms_collect_good_objects_test', 0.073, 10),
    ('language_execute_random_task', -5.913, 254.05),
    ('skymaze_irreversible_path_varied', 14.4, 100),
    ('explore_object_rewards_many', 2.438, 106.7),
  ],
)
def test_reference_returns(level, random, human):
  found = dmlab30.find(level)
  assert (found.random, found.human) == (random, human)


def test_sums_of_the_published_columns():
  assert sum(x.random for x in dmlab30.LEVELS) == pytest.approx(72.617)
  assert sum(x.human for x in dmlab30.LEVELS) == pytest.approx(3110.15)


@pytest.mark.parametrize(
  ('returns', 'capped', 'uncapped'),
  [
    (_HUMAN, 100.0, 100.0),
    (_RANDOM, 0.0, 0.0),
    (_MIDDLE, 50.0, 50.0),
    (_by_training_name(_MIDDLE), 50.0, 50.0),
    # The cap is on each level, not on the mean: 15 levels at 300, 15 at 0.
    (_scored(lambda i: 300 * (i % 2)), 50.0, 150.0),
    # Worse than random counts as it is.
    (_scored(lambda i: -50), -50.0, -50.0),
    (_scored(lambda i: 10 * i), (sum(range(0, 101, 10)) + 19 * 100) / 30, 145.0),
    ({**_RANDOM, 'rooms_watermaze': 54.0}, 100 / 30, 100 / 30),
    ({**_HUMAN, 'rooms_watermaze': 103.935}, 100.0, 100 + 100 / 30),
  ],
)
def test_scores_with_known_answers(returns, capped, uncapped):
  expected = {'mean_capped': capped, 'mean_uncapped': uncapped}
  assert dmlab30.suite_scores(returns) == pytest.approx(expected)
  assert dmlab30.scores(returns) == pytest.approx(expected)


def test_scores_of_levels():
  """One row by hand: (20 - 0.073) / (10 - 0.073) = 2.007... of the human."""
  found = dmlab30.human_normalised(
    {'rooms_collect_good_objects_train': 20.0, 'rooms_watermaze': 4.065}
  )
  assert found == pytest.approx(
    {'rooms_collect_good_objects_test': 200.73537, 'rooms_watermaze': 0.0}
  )
  prefixed = {dmlab30.PREFIX + 'rooms_watermaze': 54.0}
  assert dmlab30.human_normalised(prefixed) == pytest.approx({'rooms_watermaze': 100.0})


def test_a_missing_level_is_refused_by_name():
  returns = dict(_by_training_name(_HUMAN))
  del returns['rooms_collect_good_objects_train']
  del returns['psychlab_visual_search']
  with pytest.raises(ValueError, match='needs all 30 levels') as e:
    dmlab30.suite_scores(returns)
  assert str(e.value).endswith(
    'missing: rooms_collect_good_objects_test, psychlab_visual_search'
  )
  with pytest.raises(ValueError, match='needs all 30 levels'):
    dmlab30.suite_scores({})


def test_unknown_and_double_levels_are_refused():
  with pytest.raises(ValueError, match=r'not levels of DMLab-30: seekavoid.*, x$'):
    dmlab30.suite_scores({**_HUMAN, 'seekavoid_arena_01': 40.0, 'x': 1.0})
  both = {**_HUMAN, 'rooms_collect_good_objects_train': 3.0}
  with pytest.raises(
    ValueError, match='rooms_collect_good_objects_test is there twice'
  ):
    dmlab30.human_normalised(both)
  assert dmlab30.scores(both) == {}


def test_partial_scores_do_not_pass_for_those_of_the_suite():
  # 200.7 is capped at 100.
  some = {'rooms_collect_good_objects_train': 20.0, 'rooms_watermaze': 4.065}
  assert dmlab30.scores({**some, 'seekavoid_arena_01': 40.0}) == pytest.approx(
    {'partial_mean_capped': 50.0, 'partial_levels': 2}
  )
  assert dmlab30.scores({'seekavoid_arena_01': 40.0}) == {}
  assert dmlab30.scores({}) == {}


def test_what_a_level_is_tested_on():
  name = dmlab30.tested_on
  assert name('rooms_collect_good_objects_train') == 'rooms_collect_good_objects_test'
  assert name('rooms_watermaze') == 'rooms_watermaze'
  assert name('seekavoid_arena_01') == 'seekavoid_arena_01'
