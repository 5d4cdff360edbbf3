"""What a learner's records say, from what it gathers."""

import pathlib
import time

import numpy as np
import pytest

from impala_jax import config as config_lib
from impala_jax.distributed.control import board, protocol
from impala_jax.distributed.transport import protocol as transport
from impala_jax.learning import checkpointing, recorder
from impala_jax.runtime import refusals


class Run:
  """A recorder with what it looks at."""

  def __init__(self, *levels, resume=None):
    self.made = []
    self.control = board.Board(levels)
    self.stats = transport.ReaderStats(
      received=10, corrupted=1, lost=2, duplicated=3, stale=4, queued=5, capacity=8
    )
    config = config_lib.Config(environment=config_lib.Environment(levels=levels))
    config = config_lib.override(config, ['atari.action_repeat=2'])
    self.recorder = recorder.Recorder(
      config, self.control, lambda: self.stats, None, self.made.append, resume
    )

  def record(self, updates=0):
    self.recorder.record(updates)
    return self.made[-1].record

  def tell(self, role, index, totals, gauges=None, events=(), left=False):
    self.control.report(
      protocol.Report(role, index, 0, totals, gauges or {}, events, left)
    )


def test_one_level_needs_no_name():
  run = Run('only')
  assert run.record().episode_return is None
  evaluation = protocol.Evaluation(
    0.0, 1, 1, 4.0, {'only': 4.0}, {'capped': 0.5}, {'only': [4.0]}, {}
  )
  events = (protocol.Episode(0, 1.0, 9), protocol.Episode(0, 3.0, 9), evaluation)
  run.tell('actor', 0, {}, events=events)
  flat = run.record().flat()
  assert flat['episode_return'] == 2.0
  assert flat['episode_length'] == 9.0
  assert flat['episodes'] == 2
  assert flat['evaluation_return'] == 4.0
  assert flat['evaluation_score/capped'] == 0.5
  assert not [k for k in flat if 'return/' in k]


def test_several_levels_have_a_figure_each():
  run = Run('slow', 'fast')
  evaluation = protocol.Evaluation(0.0, 1, 1, 4.0, {'fast': 4.0}, {}, {}, {})
  run.tell('actor', 0, {}, events=(protocol.Episode(1, 8.0, 2), evaluation))
  flat = run.record().flat()
  assert flat['episode_return'] == flat['episode_return/fast'] == 8.0
  assert flat['evaluation_return/fast'] == 4.0
  assert 'episode_return/slow' not in flat


def test_a_record_is_of_all_learners_together():
  run = Run('only')
  run.recorder.take_batch(7, np.array([7, 3], np.uint64))
  own = run.record(8)
  assert (own.policy_lag_mean, own.policy_lag_max, own.queue_fill) == (2.0, 4, 5 / 8)
  run.control.fetches = 2
  run.control.refusals.add('a stranger', 'nonsense')
  for index, lag in ((1, 6.0), (2, 1.0)):
    run.tell(
      'learner',
      index,
      {'received': 20.0, 'lost': 1.0, 'parameter_fetches': 5.0, 'reports_refused': 1.0},
      {'queued': 1.0, 'capacity': 8.0, 'policy_lag_mean': lag, 'policy_lag_max': 9.0},
    )
  run.recorder.take_batch(8, np.array([6, 6], np.uint64))
  both = run.record(9)
  assert (both.unrolls_received, both.unrolls_lost) == (50, 4)
  assert (both.unrolls_corrupted, both.unrolls_duplicated, both.unrolls_stale) == (
    1,
    3,
    4,
  )
  assert both.queue_fill == 7 / 24
  assert (both.policy_lag_mean, both.policy_lag_max) == (3.0, 9)
  assert both.parameter_fetches == 12
  assert both.reports_refused == 3


def test_failures_and_dropped_unrolls_are_counted(caplog):
  run = Run('only')
  failure = protocol.EnvironmentFailure(3, 1, 0, 'it hung')
  run.tell('actor', 3, {'unrolls_dropped': 2.0, 'agent_steps': 40.0}, events=(failure,))
  run.tell('actor', 4, {'unrolls_dropped': 1.0, 'agent_steps': 2.0}, left=True)
  made = run.record()
  assert (made.environment_failures, made.unrolls_dropped) == (1, 3)
  assert 'actor 3: an environment failed: it hung' in caplog.text
  status = run.made[-1]
  assert status.environment_steps == 42
  assert [(p.role, p.index) for p in status.peers] == [('actor', 3), ('actor', 4)]


def test_times_of_actors_are_since_the_last_record():
  run = Run('only')
  assert run.record().actor_time == {}
  assert 'no actor has reported' in run.made[-1].bottleneck
  tell = lambda **seconds: run.tell(
    'actor', 0, {f'seconds/{k}': v for k, v in seconds.items()}
  )
  tell(environment=3.0, inference=1.0)
  first = run.record().actor_time
  assert (first['environment'], first['inference'], first['other']) == (0.75, 0.25, 0.0)
  tell(environment=3.0, inference=2.0)
  second = run.record().actor_time
  assert (second['environment'], second['inference']) == (0.0, 1.0)
  assert run.record().actor_time == second  # Nothing was heard since.


def test_a_run_that_goes_on_counts_on():
  metadata = {'updates': 5, 'episodes': 30, 'wall_seconds': 1000.0}
  resume = checkpointing.Checkpoint(None, metadata, pathlib.Path('x'))
  run = Run('only', resume=resume)
  run.tell('actor', 0, {}, events=(protocol.Episode(0, 1.0, 9),))
  made = run.record(6)
  assert made.episodes == run.recorder.episodes == 31
  assert made.wall_seconds >= 1000.0
  assert made.updates == 6
  config = config_lib.override(config_lib.Config(), ['atari.action_repeat=2'])
  per_update = config.frames_per_update
  assert made.frames == 6 * per_update
  # Of the one update since, not of six.
  seconds = made.wall_seconds - 1000.0
  assert made.frames_per_second == pytest.approx(per_update / seconds)
  assert made.agent_steps_per_second == made.frames_per_second / 2


def test_what_is_refused_is_counted_named_and_after_a_minute_the_bottleneck(
  monkeypatch,
):
  run = Run('only')
  run.recorder._doors.append(refusals.Refusals('unrolls'))
  run.control.refusals.add('a stranger', 'nonsense')
  run.record()
  start = time.monotonic()
  for seconds in (10, 50, 70):
    run.stats.refused += 5
    run.recorder._doors[-1].add('actor 3', 'NaN')
    run.recorder.record(0, now=start + seconds)
    words = run.made[-1].bottleneck
    assert ('no unroll was taken' in words) == (seconds > 60)
  assert 'actor 3: 3' in words
  made = run.made[-1]
  assert made.record.unrolls_refused == 15
  assert [(r.what, r.sender, r.count) for r in made.refused] == [
    ('reports or parts of such', 'a stranger', 1),
    ('unrolls', 'actor 3', 3),
  ]
  assert made.besides()['refused'][1]['sender'] == 'actor 3'
  run.stats.received += 1
  run.recorder.record(0, now=start + 80)
  assert 'no unroll was taken' not in run.made[-1].bottleneck
  # Where nothing comes at all it is not this.
  run.recorder.record(0, now=start + 800)
  assert 'no unroll was taken' not in run.made[-1].bottleneck


def test_failures_of_environments_do_not_fill_the_log(caplog):
  run = Run('only')
  failure = protocol.EnvironmentFailure(3, 1, 0, 'it hung')
  run.tell('actor', 3, {}, events=(failure,) * 50)
  assert run.record().environment_failures == 50
  assert len(caplog.records) == 1
