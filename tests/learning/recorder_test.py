"""What a learner's records say, from what it gathers."""

import json
import pathlib
import time

import numpy as np
import pytest

from impala_jax import config as config_lib
from impala_jax.distributed.control import board, protocol
from impala_jax.distributed.transport import protocol as transport
from impala_jax.environments import base
from impala_jax.learning import checkpointing, recorder
from impala_jax.reporting import sinks
from impala_jax.runtime import refusals


class Run:
  """A recorder with what it looks at."""

  def __init__(self, *levels, resume=None, writer=None):
    self.made = []
    self.control = board.Board(levels)
    self.stats = transport.ReaderStats(
      received=10, corrupted=1, lost=2, duplicated=3, stale=4, queued=5, capacity=8
    )
    config = config_lib.Config(environment=config_lib.Environment(levels=levels))
    config = config_lib.override(config, ['atari.action_repeat=2'])
    self.recorder = recorder.Recorder(
      config, self.control, lambda: self.stats, writer, self.made.append, resume
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
  metadata = {'updates': 5, 'frames': 77, 'episodes': 30, 'wall_seconds': 1000.0}
  resume = checkpointing.Checkpoint(None, metadata, pathlib.Path('x'))
  run = Run('only', resume=resume)
  run.tell('actor', 0, {}, events=(protocol.Episode(0, 1.0, 9),))
  made = run.record(6)
  assert made.episodes == run.recorder.episodes == 31
  assert made.wall_seconds >= 1000.0
  assert made.updates == 6
  config = config_lib.override(config_lib.Config(), ['atari.action_repeat=2'])
  per_update = config.frames_per_update
  # The frames of what went before are stored, not derived from today's settings.
  assert made.frames == 77 + per_update
  total = config.learner.total_frames
  assert made.learning_rate == pytest.approx(6e-4 * (1 - made.frames / total), rel=1e-9)
  # Of the one update since, not of six.
  seconds = made.wall_seconds - 1000.0
  assert made.frames_per_second == pytest.approx(per_update / seconds)
  assert made.agent_steps_per_second == made.frames_per_second / 2


def test_without_an_update_there_is_no_record_but_a_status(monkeypatch):
  """An update of 7 s, looked at every 2 s."""
  run = Run('only')
  now = [1000.0]
  monkeypatch.setattr(recorder.time, 'monotonic', lambda: now[0])
  run.recorder._start = run.recorder._next = now[0]
  lines = []
  run.recorder._writer = type(
    '', (), {'write': lambda _, s, line: lines.append(line)}
  )()
  for second in range(0, 84, 2):
    now[0] = 1000.0 + second
    updates = second // 7
    if second % 7 in (0, 1):
      run.recorder.take_batch(updates, np.array([updates], np.uint64))
    run.recorder.maybe_record(updates)
  assert lines.count(True) == 12  # One for each update, and the first word.
  assert lines.count(False) == 42 - 12
  made = [s for s in run.made if s.seconds_left is not None]
  frames = run.recorder._config.frames_per_update
  assert len(made) > 15
  for status in made:
    assert status.record.frames_per_second == pytest.approx(frames / 7, rel=0.1)
  assert run.made[5].seconds_left is None  # Too early for a look ahead.


def test_a_level_that_is_lost_leaves_the_means():
  run = Run('a', 'b')
  episodes = (protocol.Episode(0, 1.0, 9), protocol.Episode(1, 5.0, 9))
  run.recorder.take_batch(0, np.zeros(2, np.uint64), np.array([0, 1], np.int32))
  run.tell('actor', 0, {}, events=episodes)
  assert run.record().level_returns == {'a': 1.0, 'b': 5.0}
  gone = {'given_up/0': 16.0, 'instead/1': 16.0}  # It has 32 environments.
  run.tell('actor', 0, {}, gone)
  made = run.record()
  assert (made.environments_given_up, made.levels_lost) == (16, 1)
  assert made.level_returns == {'b': 5.0}
  assert made.episode_return == 5.0
  assert run.made[-1].given_up == ['a: given up by 16 environment(s), none plays it']


def test_a_level_that_never_worked_ends_the_run():
  failure = protocol.EnvironmentFailure(0, 3, 1, 'no such map')
  gone = {'given_up/1': 1.0}
  run = Run('a', 'b')
  run.recorder.take_batch(0, np.zeros(1, np.uint64), np.array([0], np.int32))
  run.tell('actor', 0, {}, gone, events=(failure,))
  with pytest.raises(base.EngineMistake, match="'b' has never worked: no such map"):
    run.record()
  # An earlier start of the run may have seen it work.
  resume = checkpointing.Checkpoint(
    None, {'updates': 5, 'frames': 640}, pathlib.Path('x')
  )
  run = Run('a', 'b', resume=resume)
  run.tell('actor', 0, {}, gone, events=(failure,))
  assert run.record(6).environments_given_up == 1


def test_a_learner_without_actors_says_so_and_quotes_none(monkeypatch):
  clock = time.monotonic()
  monkeypatch.setattr(time, 'monotonic', lambda: clock)
  run = Run('only')
  clock += recorder._LONG - 1
  run.record()
  assert 'no actor has reported yet' in run.made[-1].bottleneck
  clock += 12
  run.record()
  assert 'the actors: none has been heard for 71 s' in run.made[-1].bottleneck
  run.tell('actor', 0, {'seconds/environment': 9.0})
  run.tell('actor', 1, {'seconds/inference': 1.0}, left=True)
  clock += recorder._LONG - 1
  assert run.record().actor_time['environment'] == 0.9
  clock += 1
  run.tell('evaluator', 0, {})  # It is none that gives unrolls.
  assert run.record().actor_time == {}
  assert run.made[-1].bottleneck == (
    'the actors: none of 2 has been heard for 60 s; their logs say why'
  )
  run.tell('actor', 1, {'seconds/inference': 3.0})
  assert run.record().actor_time['inference'] > 0
  assert 'none of' not in run.made[-1].bottleneck


def test_what_was_recorded_after_the_checkpoint_stands(tmp_path):
  """A record of the end, when the last episodes have been reported."""
  metadata = {'updates': 5, 'frames': 77, 'episodes': 30, 'wall_seconds': 1000.0}
  line = {'updates': 5, 'frames': 77, 'episodes': 34, 'wall_seconds': 1002.5}
  (tmp_path / 'metrics.jsonl').write_text(json.dumps(line) + '\n')
  resume = checkpointing.Checkpoint(None, metadata, pathlib.Path('x'))
  writer = sinks.RecordWriter(tmp_path, metadata, tensorboard=False)
  run = Run('only', resume=resume, writer=writer)
  made = run.record(5)
  writer.close()
  assert (made.frames, made.episodes) == (77, 34)
  assert made.wall_seconds >= 1002.5


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
