"""The learner's main loop: batches in, updates, metrics, checkpoints.

The device works on one batch while the next is read and transferred. Nothing in
the loop waits for the result of the update it has just started: metrics and
buffers are looked at one update later.
"""

import collections
import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from impala_jax import config as config_lib
from impala_jax import optimizers
from impala_jax.acting import actor as actor_lib
from impala_jax.distributed.control import board as control_lib
from impala_jax.distributed.gang import gang as learner_gang
from impala_jax.distributed.transport import protocol as transport
from impala_jax.learning import checkpointing, prefetcher
from impala_jax.learning import learner as learner_lib
from impala_jax.reporting import bottleneck, inference_figures, metrics

_STAGES = ('wait', 'update', 'publish', 'checkpoint', 'metrics')


class LearnerLoop:
  """Trains until the configured frames are done or `should_stop`.

  Args:
    config: of the run.
    learner: the update.
    reader: where batches come from.
    control: where parameters go and reports come from.
    writer: of metrics; None for none.
    saver: of checkpoints; None for none.
    resume: a checkpoint to go on from.
    on_record: called with each metrics record.
    should_stop: asked at least twice a second.
    gang: the learners that update together; None for one alone. All of them must be
      given the same `resume`.
  """

  def __init__(
    self,
    config: config_lib.Config,
    learner: learner_lib.Learner,
    reader: transport.Reader,
    control: control_lib.Control,
    writer: metrics.MetricsWriter | None = None,
    saver: checkpointing.Saver | None = None,
    resume: checkpointing.Checkpoint | None = None,
    on_record: Callable[[dict[str, Any]], None] = lambda record: None,
    should_stop: Callable[[], bool] = lambda: False,
    gang: learner_gang.Alone | None = None,
  ):
    self._config = config
    self._gang = gang or learner_gang.Alone()
    self._learner = learner
    self._reader = reader
    self._control = control
    self._writer = writer
    self._saver = saver
    self._on_record = on_record
    self._should_stop = should_stop
    before = resume.metadata if resume else {}
    self._wall_before = float(before.get('wall_seconds', 0.0))
    self._episodes_before = int(before.get('episodes', 0))
    self._state = (
      learner.replicate(resume.state) if resume else learner.init(config.seed)
    )
    self.updates = int(before.get('updates', 0))
    self._watch = metrics.Stopwatch(_STAGES)
    self._episodes = metrics.EpisodeLog(config.environment.levels)
    self._environment_failures = 0
    self._evaluation: dict[str, float] = {}
    self._lag: list[np.ndarray] = []
    self._skipped = 0
    self._actor_seconds: dict[str, float] = {}
    self._actor_share: dict[str, float] = {}
    self._inference = inference_figures.InferenceFigures()
    self._newest: dict[str, jax.Array] = {}  # Figures of the last update.
    self._start = self._ended = time.monotonic()
    self._mark = (self._start, self.updates)

  @property
  def frames(self) -> int:
    return self.updates * self._config.frames_per_update

  @property
  def state(self) -> learner_lib.LearnerState:
    """Replicated; valid after `run`."""
    return self._state

  def run(self) -> None:
    """Raises whatever the reader's thread or a checkpoint's disk raised."""
    config = self._config.learner
    total, first_update = self._config.total_updates, self.updates
    batches = prefetcher.Prefetcher(
      self._reader, self._learner.put, self.updates, config.max_policy_lag
    )
    first = self._learner.snapshot(self._state)
    self._control.publish(self.updates, first.params)
    running: collections.deque[tuple[Any, transport.Batch]] = collections.deque()
    newest = self._newest
    next_record = time.monotonic() + config.metrics_interval
    next_save = time.monotonic() + config.checkpoint_interval
    try:
      item = None
      while self.updates < total:
        if item is None and not self._should_stop():
          item = batches.get(timeout=0.5)
        verdict = self._gang.decide(item is not None, self._should_stop())
        self._watch.charge('wait')
        if verdict is learner_gang.Verdict.STOP:
          break
        if verdict is learner_gang.Verdict.GO:
          assert item is not None
          batch, rows = item
          versions = self._reader.layout.header(batch.rows)['version']
          if self.updates == first_update:
            self._record(newest, time.monotonic(), 'starting: compiling the update')
          self._lag.append(self.updates - versions.astype(np.int64))
          with self._gang.updating():
            self._state, params, figures = self._learner.update(self._state, rows)
          del rows
          item = None
          self.updates += 1
          running.append((figures, batch))
          if len(running) > 1:
            newest = self._finish(running.popleft())
          self._watch.charge('update')
          if self.updates % config.publish_interval == 0 or self.updates == total:
            self._control.publish(self.updates, params)
          self._watch.charge('publish')
        now = time.monotonic()
        if now >= next_record:
          self._record(newest, now)
          next_record = now + config.metrics_interval
          self._watch.charge('metrics')
        if self._saver is not None and now >= next_save and not self._saver.busy:
          self._save()
          next_save = now + config.checkpoint_interval
          self._watch.charge('checkpoint')
    finally:
      batches.close()
      while running:
        newest = self._finish(running.popleft())
      self._watch.charge('update')
    if self._saver is not None:
      self._save()
      self._saver.wait()
      self._watch.charge('checkpoint')
    self._newest = newest
    self._ended = time.monotonic()

  def last_record(self) -> None:
    """Writes the record of the end: after `run`, once the actors have reported theirs.

    Until then the episodes of a run's last seconds are with the actors.
    """
    self._record(self._newest, self._ended)

  def _finish(self, item: tuple[Any, transport.Batch]) -> dict[str, jax.Array]:
    figures, batch = item
    with self._gang.updating():
      jax.block_until_ready(figures)
    batch.release()
    return figures

  def _save(self) -> None:
    assert self._saver is not None
    copy = self._learner.snapshot(self._state)
    metadata = {
      'updates': self.updates,
      'frames': self.frames,
      'wall_seconds': self._wall_before + time.monotonic() - self._start,
      'episodes': self._episodes_before + self._episodes.count,
      'config': config_lib.to_dict(self._config),
    }
    self._saver.save(self.updates, lambda: learner_lib.to_host(copy), metadata)

  def _record(self, figures: dict[str, jax.Array], now: float, words: str = '') -> None:
    self._take_events()
    seconds, updates = now - self._mark[0], self.updates - self._mark[1]
    self._mark = (now, self.updates)
    rate = updates * self._config.frames_per_update / max(seconds, 1e-9)
    others = [p.totals for p in self._control.peers() if p.role == 'learner']
    stats = transport.ReaderStats(**{
        name: value + int(sum(other.get(name, 0) for other in others))
        for name, value in dataclasses.asdict(self._reader.stats()).items()
    })  # fmt: skip
    shares = self._watch.shares()
    actor = self._actor_shares()
    lag = np.concatenate(self._lag) if self._lag else np.zeros(1, np.int64)
    lag_means = [lag.mean(), *(o.get('policy_lag_mean', 0.0) for o in others)]
    lag_maxima = [lag.max(), *(o.get('policy_lag_max', 0) for o in others)]
    self._lag = []
    fill = stats.queued / max(stats.capacity, 1)
    record: dict[str, Any] = {
      'time': time.time(),
      'wall_seconds': self._wall_before + now - self._start,
      'frames': self.frames,
      'updates': self.updates,
      'frames_per_second': rate,
      'agent_steps_per_second': rate / self._config.environment.action_repeat,
      'learning_rate': optimizers.learning_rate_at(
        self._config, self.updates - self._skipped
      ),
      'policy_lag_mean': np.mean(lag_means),
      'policy_lag_max': max(lag_maxima),
      'queue_fill': fill,
      'unrolls_received': stats.received,
      'unrolls_corrupted': stats.corrupted,
      'unrolls_lost': stats.lost,
      'unrolls_duplicated': stats.duplicated,
      'unrolls_stale': stats.stale,
      'unrolls_dropped': self._control.total('actor', 'unrolls_dropped'),
      'environment_failures': self._environment_failures,
      'parameter_fetches': self._control.fetches
      + sum(o.get('parameter_fetches', 0) for o in others),
      'episodes': self._episodes_before + self._episodes.count,
      **self._episodes.summary(),
      **_prefixed('score/', metrics.suite_scores(self._config, self._episodes.means())),
      **self._evaluation,
      **{k: np.asarray(v.addressable_shards[0].data)[0] for k, v in figures.items()},
      **{f'learner_time/{k}': v for k, v in shares.items()},
      **{f'actor_time/{k}': v for k, v in actor.items()},
      **self._inference.update(self._control, seconds),
    }
    if record.get('skipped', 0) > self._skipped:
      self._skipped = int(record['skipped'])
      logging.warning(
        'batches with a loss or gradient that is not finite, skipped so far: %d',
        self._skipped,
      )
    words = words or bottleneck.describe(
      shares, actor, fill, remote=self._config.inference.servers > 0
    )
    if self._writer is not None:
      self._writer.write(
        record,
        bottleneck=words,
        total_frames=self._config.learner.total_frames,
        environment_steps=self._control.total('actor', 'agent_steps'),
        peers=[
          {'role': p.role, 'index': p.index, 'silent_seconds': max(0.0, now - p.heard)}
          for p in self._control.peers()
        ],
      )
    self._on_record({**record, 'bottleneck': words})

  def _take_events(self) -> None:
    for event in self._control.drain_events():
      if event['kind'] == 'episode':
        self._episodes.add(event['task_id'], event['return'], event['length'])
      elif event['kind'] == 'environment_failure':
        self._environment_failures += 1
        logging.warning(
          'actor %d: an environment failed: %s', event['actor'], event['cause']
        )
      elif event['kind'] == 'evaluation':
        self._evaluation = {
          'evaluation_return': event['mean'],
          **_prefixed('evaluation_score/', event['scores']),
        }
        if len(self._config.environment.levels) > 1:
          self._evaluation |= _prefixed('evaluation_return/', event['means'])

  def _actor_shares(self) -> dict[str, float]:
    """Fractions of the actors' time by stage since the last record."""
    stages = actor_lib.STAGES
    total = {s: self._control.total('actor', f'seconds/{s}') for s in stages}
    delta = {s: v - self._actor_seconds.get(s, 0.0) for s, v in total.items()}
    whole = sum(delta.values())
    if whole > 0:  # Else no actor has reported since; the last word stands.
      self._actor_seconds = total
      self._actor_share = {s: v / whole for s, v in delta.items()}
    return self._actor_share


def _prefixed(prefix: str, figures: dict[str, float]) -> dict[str, float]:
  return {prefix + name: value for name, value in figures.items()}
