"""What is recorded of a run: gathered from all sides, put into records."""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from impala_jax import config as config_lib
from impala_jax import losses, optimizers
from impala_jax.acting import stages
from impala_jax.distributed.control import protocol
from impala_jax.distributed.transport import protocol as transport
from impala_jax.environments import base
from impala_jax.learning import checkpointing
from impala_jax.learning import learner as learner_lib
from impala_jax.reporting import (
  bottleneck,
  engine_figures,
  given_up,
  inference_figures,
  pace,
  sinks,
  stopwatch,
)
from impala_jax.reporting import episodes as episodes_lib
from impala_jax.reporting import record as record_lib
from impala_jax.runtime import checkpoint_files
from impala_jax.runtime import refusals as refusals_lib
from impala_jax.runtime.run_directory import process_name

# Seconds without a word of any actor, or without an unroll that was taken, after which
# that is said; or between two lines of the log.
_LONG = 60.0
_MOST_SENDERS = 5  # Of what was refused, by each door.
# Why an unroll that came is not taken, by its count.
_REFUSED = {
  'unrolls_refused': 'that no actor can have meant',
  'unrolls_corrupted': 'of another layout, or damaged',
  'unrolls_stale': 'older than learner.max_policy_lag allows',
  'unrolls_duplicated': 'that had come before',
}


class Recorder:
  """Makes the records of a learner. Used by one thread.

  Args:
    config: of the run.
    control: where reports come to.
    stats: of this learner's queue.
    writer: of records; None for none.
    on_record: called with each record.
    resume: the checkpoint from which the run goes on.
    refusals: of this learner's queue, where they are to be told.

  Attributes:
    watch: of the learner's stages, charged by its loop.
    metrics: of the newest update that has ended, on the devices.
  """

  def __init__(
    self,
    config: config_lib.Config,
    control: protocol.Control,
    stats: Callable[[], transport.ReaderStats],
    writer: sinks.RecordWriter | None = None,
    on_record: Callable[[record_lib.Status], None] = lambda status: None,
    resume: checkpointing.Checkpoint | None = None,
    refusals: refusals_lib.Refusals | None = None,
  ):
    self._config = config
    self._doors = [control.refusals, *([refusals] if refusals else [])]
    self._control = control
    self._stats = stats
    self._writer = writer
    self._on_record = on_record
    before = resume.metadata if resume else {}
    self._frames_ahead = checkpoint_files.frames_ahead(before, config.frames_per_update)
    # What was recorded after the checkpoint, without an update more, stands as well.
    last = writer.last if writer else {}
    newest = lambda name: max(before.get(name, 0), last.get(name, 0))
    self._wall_before = float(newest('wall_seconds'))
    self._episodes_before = int(newest('episodes'))
    self.watch = stopwatch.Stopwatch(record_lib.LEARNER_STAGES)
    self.metrics: losses.Metrics = {}
    self._several_levels = len(config.environment.levels) > 1
    self._episodes = episodes_lib.EpisodeLog(config.environment.levels)
    self._environment_failures = 0
    self._next_failure_line = 0.0
    self._evaluation: protocol.Evaluation | None = None
    self._lag: list[npt.NDArray[np.int64]] = []
    self._skipped = 0
    self._actor_seconds: dict[str, float] = {}
    self._actor_time: dict[str, float] = {}
    self._inference = inference_figures.InferenceFigures()
    self._engines = engine_figures.EngineFigures()
    self._start = self._end = time.monotonic()
    self._mark = (self._start, int(before.get('updates', 0)))
    self._next = self._start + config.learner.metrics_interval
    self._first = self._mark[1]
    self._pace = pace.Pace(config.learner.metrics_interval)
    self._status: record_lib.Status | None = None
    # Levels that have given unrolls; None where an earlier start has seen that.
    self._worked: set[int] | None = None if resume else set()
    self._causes: dict[int, str] = {}  # Of the last failure of a level's engine.
    self._taken: dict[str, int] = {}  # Counts when the last unroll was taken,
    self._taken_at = self._start  # and when that was.

  @property
  def wall_seconds(self) -> float:
    """Of training, earlier starts of the run included."""
    return self._wall_before + time.monotonic() - self._start

  @property
  def episodes(self) -> int:
    """That have ended, earlier starts included."""
    return self._episodes_before + self._episodes.count

  def take_batch(
    self,
    updates: int,
    versions: npt.NDArray[np.uint64],
    tasks: npt.NDArray[np.int32] | None = None,
  ) -> None:
    """Notes how old the unrolls [B] of a batch are after so many updates.

    Args:
      updates: so far.
      versions: of their parameters.
      tasks: of their levels.
    """
    # What a learner that is gone gave out may be ahead of the checkpoint.
    self._lag.append(np.maximum(updates - versions.astype(np.int64), 0))
    if self._worked is not None and tasks is not None:
      self._worked.update(tasks.tolist())
    if updates > self._first:  # The first one is compiled.
      self._pace.note(updates, time.monotonic())

  def maybe_record(self, updates: int) -> None:
    """Makes a record if it is time, of at least one update.

    Without one only the status is renewed: who is there, and what is waited for.

    Raises:
      base.EngineMistake: a level was given up that has never worked.
    """
    now = time.monotonic()
    if now < self._next:
      return
    if self._status is None or updates > self._mark[1]:
      self.record(updates)
    else:
      self._renew(now)
    self._next = now + self._config.learner.metrics_interval
    self.watch.charge('metrics')

  def end(self) -> None:
    """The last update has ended."""
    self._end = time.monotonic()

  def last_record(self, updates: int) -> None:
    """Makes the record of the end, once the actors have reported theirs.

    Until then the episodes of a run's last seconds are with the actors.
    """
    self.record(updates, now=self._end)

  def record(self, updates: int, words: str = '', now: float | None = None) -> None:
    """Makes a record.

    Args:
      updates: so far.
      words: in place of those on the bottleneck.
      now: time.monotonic() that it is of.
    """
    now = time.monotonic() if now is None else now
    made = self._make(updates, now)
    self._tell(made, now, words or self._nothing_taken(made, now))

  def _renew(self, now: float) -> None:
    """The status of a run that has made no update since its last record."""
    assert self._status is not None
    self._take_events()
    self._check_given_up()
    rate = self._frames_per_second(now)
    made = dataclasses.replace(
      self._status.record,
      time=time.time(),
      wall_seconds=self._wall_before + now - self._start,
      frames_per_second=rate,
      agent_steps_per_second=rate / self._config.action_repeat,
      environment_failures=self._environment_failures,
      episodes=self.episodes,
      actor_time=self._take_actor_time(),
    )
    self._tell(made, now, line=False)

  def _tell(
    self, made: record_lib.Record, now: float, words: str = '', line: bool = True
  ) -> None:
    peers = self._control.peers()
    words = words or self._silence(now) or self._bottleneck(made, peers, now)
    left = self._config.learner.total_frames - made.frames
    status = self._status = record_lib.Status(
      record=made,
      bottleneck=words,
      total_frames=self._config.learner.total_frames,
      seconds_left=(
        max(0, left) / made.frames_per_second
        if self._pace.known and made.frames_per_second > 0
        else None
      ),
      environment_steps=int(self._control.total('actor', 'agent_steps')),
      given_up=given_up.count(self._config, peers).describe(self._config),
      peers=[
        record_lib.Heard(p.role, p.index, max(0.0, now - heard)) for p, heard in peers
      ],
      refused=[
        record_lib.Refused(door.what, sender, count)
        for door in self._doors
        for sender, count in list(door.by_sender().items())[:_MOST_SENDERS]
      ],
    )
    if self._writer is not None:
      self._writer.write(status, line)
    self._on_record(status)

  def _frames_per_second(self, now: float, otherwise: float = 0.0) -> float:
    """Or `otherwise` updates a second, before there is a pace."""
    found = self._pace.per_second(now)
    return (otherwise if found is None else found) * self._config.frames_per_update

  def _check_given_up(self) -> given_up.GivenUp:
    found = given_up.count(self._config, self._control.peers())
    self._episodes.lost = found.lost
    never = found.given_up.keys() - self._worked if self._worked is not None else ()
    for task in never:
      level = self._config.environment.levels[task]
      cause = self._causes.get(task, 'no cause is known')
      raise base.EngineMistake(f'level {level!r} has never worked: {cause}')
    return found

  def _make(self, updates: int, now: float) -> record_lib.Record:
    self._take_events()
    config, evaluation = self._config, self._evaluation
    seconds, done = now - self._mark[0], updates - self._mark[1]
    self._mark = (now, updates)
    lost = self._check_given_up()
    rate = self._frames_per_second(now, done / max(seconds, 1e-9))
    others = [
      {**p.totals, **p.gauges} for p, _ in self._control.peers() if p.role == 'learner'
    ]
    counts = {
      **dataclasses.asdict(self._stats()),
      'parameter_fetches': self._control.fetches,
      'reports_refused': self._control.refusals.total,
    }
    counts = {k: v + int(sum(o.get(k, 0) for o in others)) for k, v in counts.items()}
    lag_mean, lag_max = self._take_lag(others)
    mean = self._episodes.mean()
    means = self._episodes.means()
    return record_lib.Record(
      time=time.time(),
      wall_seconds=self._wall_before + now - self._start,
      frames=updates * config.frames_per_update + self._frames_ahead,
      updates=updates,
      frames_per_second=rate,
      agent_steps_per_second=rate / config.action_repeat,
      learning_rate=optimizers.learning_rate_at(
        config, updates - self._skipped, self._frames_ahead
      ),
      policy_lag_mean=lag_mean,
      policy_lag_max=lag_max,
      queue_fill=counts['queued'] / max(counts['capacity'], 1),
      unrolls_received=counts['received'],
      unrolls_corrupted=counts['corrupted'],
      unrolls_refused=counts['refused'],
      unrolls_lost=counts['lost'],
      unrolls_duplicated=counts['duplicated'],
      unrolls_stale=counts['stale'],
      unrolls_dropped=int(self._control.total('actor', 'unrolls_dropped')),
      environment_failures=self._environment_failures,
      environments_given_up=sum(lost.given_up.values()),
      levels_lost=len(lost.lost),
      parameter_fetches=counts['parameter_fetches'],
      reports_refused=counts['reports_refused'],
      episodes=self.episodes,
      episode_return=mean[0] if mean else None,
      episode_length=mean[1] if mean else None,
      level_returns=means if self._several_levels else {},
      scores=episodes_lib.suite_scores(config, means),
      evaluation_return=evaluation.mean if evaluation else None,
      evaluation_scores=evaluation.scores if evaluation else {},
      evaluation_level_returns=(
        evaluation.means if evaluation and self._several_levels else {}
      ),
      metrics=self._read_metrics(),
      learner_time=self.watch.shares(),
      actor_time={} if self._silence(now) else self._take_actor_time(),
      inference=self._inference.update(self._control, seconds),
      engines=self._engines.update(self._control),
    )

  def _bottleneck(
    self,
    made: record_lib.Record,
    peers: Sequence[protocol.Peer],
    now: float,
  ) -> str:
    words = bottleneck.describe(
      made.learner_time,
      made.actor_time,
      made.queue_fill,
      remote=self._config.inference.servers > 0,
      silent=[
        (process_name(p.role, p.index), now - heard)
        for p, heard in peers
        if not p.left and p.role in ('actor', 'inference')
      ],
      idle=self._pace.idle(now),
    )
    if made.updates == self._first and not self._lag and 'starting' not in words:
      return f'starting: waiting for the first unrolls; {words}'
    return words

  def _silence(self, now: float) -> str:
    """That there is no actor, in words; empty while one is heard."""
    heard = [p.heard for p in self._control.peers() if p.report.role == 'actor']
    silent = now - max(heard, default=self._start)
    if silent < _LONG:
      return ''
    none = f'none of {len(heard)}' if heard else 'none'
    return f'the actors: {none} has been heard for {silent:.0f} s; their logs say why'

  def _nothing_taken(self, made: record_lib.Record, now: float) -> str:
    """That unrolls come, but none is taken; empty where that is not so."""
    counts = {
      field: int(getattr(made, field)) for field in ('unrolls_received', *_REFUSED)
    }
    if not self._taken or counts['unrolls_received'] != self._taken['unrolls_received']:
      self._taken, self._taken_at = counts, now
      return ''
    refused = {words: counts[f] - self._taken[f] for f, words in _REFUSED.items()}
    seconds = now - self._taken_at
    if seconds < _LONG or not any(refused.values()):
      return ''
    return bottleneck.nothing_taken(seconds, refused, self._doors[-1].in_words())

  def _read_metrics(self) -> dict[str, float]:
    found = learner_lib.to_host(self.metrics)
    # It is an index, which `learner.suspects` knows, and no figure.
    metrics = {k: float(v) for k, v in found.items() if k != 'culprit'}
    if metrics.get('skipped', 0) > self._skipped:
      self._skipped = int(metrics['skipped'])
      logging.warning(
        'updates skipped so far, for something was not finite: %d',
        self._skipped,
      )
    return metrics

  def _take_lag(self, others: list[dict[str, float]]) -> tuple[float, int]:
    """Mean and maximum since the last record; of several learners each counts alike."""
    lag = np.concatenate(self._lag) if self._lag else np.zeros(1, np.int64)
    self._lag = []
    means = [float(lag.mean()), *(o.get('policy_lag_mean', 0.0) for o in others)]
    maxima = [int(lag.max()), *(int(o.get('policy_lag_max', 0)) for o in others)]
    return float(np.mean(means)), max(maxima)

  def _take_events(self) -> None:
    for event in self._control.drain_events():
      match event:
        case protocol.Episode():
          self._episodes.add(event.task_id, event.episode_return, event.length)
          if self._worked is not None:
            self._worked.add(event.task_id)
        case protocol.EnvironmentFailure():
          self._environment_failures += 1
          self._causes[event.task_id] = event.cause
          # What actors say is no reason to fill a disk.
          if (now := time.monotonic()) >= self._next_failure_line:
            self._next_failure_line = now + _LONG
            logging.warning(
              'actor %d: an environment failed: %s (%d so far, of all actors)',
              event.actor,
              event.cause,
              self._environment_failures,
            )
        case protocol.Evaluation():
          self._evaluation = event

  def _take_actor_time(self) -> dict[str, float]:
    """Shares of the actors' time by stage since the last record."""
    total = {s: self._control.total('actor', f'seconds/{s}') for s in stages.STAGES}
    delta = {s: v - self._actor_seconds.get(s, 0.0) for s, v in total.items()}
    whole = sum(delta.values())
    if whole > 0:  # Else no actor has reported since; the last word stands.
      self._actor_seconds = total
      self._actor_time = {s: v / whole for s, v in delta.items()}
    return self._actor_time
