"""The words must name the stage that the figures point at."""

from impala_jax.reporting import bottleneck


def test_a_waiting_learner_points_at_the_actors_and_their_largest_stage():
  words = bottleneck.describe(
    {'wait': 0.8, 'update': 0.2},
    {'environment': 0.7, 'inference': 0.2, 'learner': 0.1},
    0.0,
  )
  assert words.startswith('the actors')
  assert '80%' in words
  assert 'stepping environments (70%' in words


def test_actors_that_wait_for_inference_servers_say_so():
  actor = {'environment': 0.2, 'inference': 0.7, 'learner': 0.1}
  describe = lambda remote: bottleneck.describe({'wait': 0.8}, actor, 0.0, remote)
  assert 'running the policy (70%' in describe(False)
  assert 'waiting for the inference servers (70%' in describe(True)


def test_held_back_actors_point_at_the_learner():
  words = bottleneck.describe(
    {'wait': 0.01, 'update': 0.95}, {'environment': 0.3, 'learner': 0.6}, 1.0
  )
  assert words.startswith('the learner')
  assert '60%' in words


def test_neither():
  words = bottleneck.describe(
    {'wait': 0.2, 'update': 0.8}, {'environment': 0.9, 'learner': 0.1}, 0.5
  )
  assert words.startswith('balanced')


def test_no_actor_yet():
  assert 'no actor' in bottleneck.describe({'wait': 1.0}, {}, 0.0)


def test_the_silent_are_named():
  learner, actor = {'wait': 0.9}, {'environment': 1.0}

  def describe(*seconds, idle=0.0):
    silent = [(f'actor-{i}', s) for i, s in enumerate(seconds)]
    return bottleneck.describe(learner, actor, 0.0, silent=silent, idle=idle)

  assert describe(1.0, 2.0) == bottleneck.describe(learner, actor, 0.0)
  assert describe(1.0, 40.0).startswith('the actors: the learner waits 90%')
  assert describe(1.0, 40.0).endswith('; not heard of: actor-1 for 40 s')
  assert describe(1.0, 40.0, idle=30.0) == (
    'no update for 30 s: not heard of: actor-1 for 40 s'
  )
  # Figures of those who are gone are no explanation.
  assert describe(70.0, 61.0) == (
    'no actor is left that reports: not heard of: actor-0 for 70 s, actor-1 for 61 s'
  )
  assert describe(*range(20, 30), 1.0).endswith('actor-7 for 27 s and 7 more')


def test_refused_unrolls_are_said_to_be_refused_and_whose_they_are():
  words = bottleneck.nothing_taken(
    75.2, {'that no actor can have meant': 12, 'too old': 0}, 'actor 3: 12'
  )
  assert 'no unroll was taken for 75 s, in which came 12 that no actor can' in words
  assert 'actor 3: 12' in words
  assert 'too old' not in words
