"""Many levels in parallel: how they are dealt out, fail, and are stopped."""

import collections
import threading

import jax
import pytest

from impala_jax import components, suites
from impala_jax import config as config_lib
from impala_jax.environments import base, registry
from impala_jax.evaluation import playing
from tests import counting


@pytest.mark.parametrize(
  ('levels', 'episodes', 'processes', 'expected'),
  [
    (1, 5, 5, (5, 1)),
    (1, 32, 4, (4, 1)),
    (1, 1, 8, (1, 1)),
    (30, 1, 4, (1, 4)),
    (30, 5, 4, (1, 4)),  # Not 4 at a time for one level: 3 would idle at the fifth.
    (30, 10, 4, (2, 2)),
    (30, 100, 4, (4, 1)),
    (30, 10, 30, (10, 3)),
    (3, 7, 1, (1, 1)),
  ],
)
def test_arrangement(levels, episodes, processes, expected):
  assert playing.arrange(levels, episodes, processes) == expected


def test_arrangements_use_what_is_there_and_no_more():
  for levels in (1, 2, 3, 8, 30):
    for episodes in (1, 2, 5, 10, 33, 100):
      for processes in (1, 2, 3, 4, 7, 16, 64):
        width, lanes = playing.arrange(levels, episodes, processes)
        assert 1 <= width <= episodes
        assert 1 <= lanes <= levels
        assert width * lanes <= processes
        shares = playing._shares(episodes, width)
        assert sum(shares) == episodes
        assert max(shares) - min(shares) <= 1
        # Rounds of episodes, against those that no arrangement could go below.
        rounds = -(-levels // lanes) * max(shares)
        least = max(
          -(-levels * episodes // processes), -(-episodes // min(episodes, processes))
        )
        assert rounds <= 2 * least


class _Watch:
  """What the environments of a suite went through; shared by threads."""

  def __init__(self):
    self.lock = threading.Lock()
    self.alive = self.most_alive = 0
    self.seeds = []


class _Watched:
  """A `SequentialVector` that tells a `_Watch` of itself."""

  def __init__(self, vector, watch, fails_after=None):
    self._vector = vector
    self._watch = watch
    self._left = fails_after
    self.num_envs, self.spec = vector.num_envs, vector.spec
    self.task_ids = vector.task_ids
    with watch.lock:
      watch.alive += self.num_envs
      watch.most_alive = max(watch.most_alive, watch.alive)

  def reset(self, seed):
    with self._watch.lock:
      self._watch.seeds.append(seed)
    self._vector.reset(seed)

  def send(self, env_ids, actions):
    self._vector.send(env_ids, actions)

  def recv(self, timeout):
    if self._left is not None:
      self._left -= 1
      if self._left < 0:
        raise base.EngineError('level broken, seed 7: it exited with code 1')
    return self._vector.recv(timeout)

  def close(self):
    with self._watch.lock:
      self._watch.alive -= self.num_envs
    self._vector.close()


@pytest.fixture
def watched():
  """A suite whose level `<n>` has episodes of n steps; `broken` fails after one."""
  watch = _Watch()

  def make_one(level, seed):
    del seed
    length = 4 if level == 'broken' else int(level)
    return counting.CountingEnvironment(0, (length,))

  registry.register('watched', make_one)
  inner = registry.find('watched')

  def make(config, tasks, evaluation):
    assert evaluation
    level = config.environment.levels[tasks[0]]
    fails_after = 12 if level == 'broken' else None
    return _Watched(inner.make(config, tasks, evaluation), watch, fails_after)

  scores = lambda means: {'sum': sum(means.values())}
  registry.register('watched', registry.Suite(make, inner.spec, scores=scores))
  yield watch
  suites._suites.pop('watched')


def build(levels, **evaluator):
  return components.build(
    config_lib.Config(
      environment=config_lib.Environment(suite='watched', levels=levels),
      network=config_lib.Network(torso='mlp', hidden=4, frame_stack=1),
      evaluator=config_lib.Evaluator(**evaluator),
    )
  )


def params_of(parts):
  return parts.agent.init(jax.random.key(0))


def test_levels_in_parallel(watched):
  parts = build(('3', '30', '7', '12'))
  thread = threading.get_ident()
  heard = []

  def hear(kind):
    def callback(x):
      assert threading.get_ident() == thread
      heard.append((kind, x if kind == 'begin' else x.task_id))

    return callback

  results = playing.play_levels(
    parts,
    params_of(parts),
    [3, 0, 1],
    5,
    processes=4,
    seed=1,
    on_begin=hear('begin'),
    on_episode=hear('episode'),
    on_level=hear('level'),
  )
  assert [r.task_id for r in results] == [3, 0, 1]
  assert all(r.complete for r in results)
  assert [{e.length for e in r.episodes} for r in results] == [{12}, {3}, {30}]
  assert collections.Counter(heard) == {
    (kind, task): count
    for task in (3, 0, 1)
    for kind, count in (('begin', 1), ('episode', 5), ('level', 1))
  }
  for task in (3, 0, 1):
    mine = [kind for kind, t in heard if t == task]
    assert mine == ['begin', *['episode'] * 5, 'level']
  assert watched.alive == 0
  assert watched.most_alive <= 4
  assert len(set(watched.seeds)) == 3


def test_seeds_do_not_depend_on_the_company(watched):
  parts = build(('3', '4', '5'))
  params = params_of(parts)
  playing.play_levels(parts, params, [0, 1, 2], 1, processes=1, seed=1)
  together = list(watched.seeds)
  playing.play_levels(parts, params, [1], 1, processes=1, seed=1)
  playing.play_levels(parts, params, [1], 1, processes=1, seed=2)
  assert watched.seeds[3] == together[1]
  assert watched.seeds[4] not in together


def test_a_level_that_fails_does_not_hold_up_the_others(watched):
  parts = build(('3', 'broken', '5'))
  results = playing.play_levels(
    parts, params_of(parts), [0, 1, 2], 4, processes=1, seed=1
  )
  assert [r.complete for r in results] == [True, False, True]
  assert results[1].error == (
    'EngineError: level broken, seed 7: it exited with code 1'
  )
  assert len(results[1].episodes) == 2  # Of 5 results each; the third was cut off.
  assert watched.alive == 0


def test_stopping_leaves_what_there_is(watched):
  parts = build(('3', '400', '5'))
  ended = []
  results = playing.play_levels(
    parts,
    params_of(parts),
    [0, 1, 2],
    10,
    processes=1,
    seed=1,
    on_episode=ended.append,
    should_stop=lambda: len(ended) > 12,
  )
  assert results[0].complete
  assert 0 < len(results[1].episodes) < 10
  assert results[2].episodes == []
  assert not any(r.error for r in results)
  assert watched.alive == 0


def test_an_error_of_the_caller_ends_the_play(watched):
  parts = build(('3', '5'))

  def fail(task_id):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    playing.play_levels(
      parts, params_of(parts), [0, 1], 10**9, processes=2, seed=1, on_begin=fail
    )
  assert watched.alive == 0
