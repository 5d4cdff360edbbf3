"""The learner's main loop: batches in, updates, parameters, records, checkpoints.

The device works on one batch while the next is read and transferred. Nothing in
the loop waits for the result of the update it has just started: metrics and
buffers are looked at one update later. What is recorded is the `recorder`'s business.
"""

import collections
import functools
import time
from collections.abc import Callable

import jax

from impala_jax import config as config_lib
from impala_jax import losses, types
from impala_jax.distributed.control import protocol
from impala_jax.distributed.transport import protocol as transport
from impala_jax.learning import agreement as agreement_lib
from impala_jax.learning import checkpointing, prefetcher
from impala_jax.learning import learner as learner_lib
from impala_jax.learning import recorder as recorder_lib
from impala_jax.runtime import checkpoint_files

_WINDOW = 50  # Updates, of which more than half must not be skipped.

_SILENCE = 5.0  # Seconds without a batch, after which the reason is looked for.


class NotFinite(RuntimeError):
  """Updates are skipped instead of made; says what was not finite first."""


class LearnerLoop:
  """Trains until the configured frames are done or `should_stop`.

  Args:
    config: of the run.
    learner: the update.
    reader: where batches come from.
    control: where parameters go.
    recorder: what makes the records.
    saver: of checkpoints; None for none.
    resume: a checkpoint to go on from.
    should_stop: asked at least twice a second.
    agreement: with the learners that update together; None for one alone. All of them
      must be given the same `resume`.
    given_out: the newest version of parameters that a learner of this run before this
      one may have given out. Actors still act with them.
  """

  def __init__(
    self,
    config: config_lib.Config,
    learner: learner_lib.Learner,
    reader: transport.Reader,
    control: protocol.Control,
    recorder: recorder_lib.Recorder,
    saver: checkpointing.Saver | None = None,
    resume: checkpointing.Checkpoint | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    agreement: agreement_lib.Agreement | None = None,
    given_out: int = 0,
  ):
    self._config = config
    self._given_out = given_out
    self._agreement = agreement or agreement_lib.Agreement()
    self._learner = learner
    self._reader = reader
    self._control = control
    self._recorder = recorder
    self._saver = saver
    self._should_stop = should_stop
    self._state = (
      learner.replicate(resume.state) if resume else learner.init(config.seed)
    )
    before = resume.metadata if resume else {}
    self.updates = int(before.get('updates', 0))
    self._frames_ahead = checkpoint_files.frames_ahead(before, config.frames_per_update)
    self._culprits: list[jax.Array] = []  # Of the updates since the last look.
    self._skipped = int(resume.state.skipped) if resume else 0  # By then.
    self._refused = 0  # Unrolls by the last look at why nothing comes.

  @property
  def frames(self) -> int:
    """Trained on in all, whatever the updates of earlier starts were made of."""
    return self.updates * self._config.frames_per_update + self._frames_ahead

  @property
  def state(self) -> learner_lib.LearnerState:
    """Replicated; valid after `run`."""
    return self._state

  def run(self) -> None:
    """Raises whatever the reader's thread or a checkpoint's disk raised.

    Raises:
      NotFinite: half of the last updates were skipped, or of all where these were few.
    """
    config, recorder, watch = self._config.learner, self._recorder, self._recorder.watch
    total, first_update = config.total_frames, self.updates
    batches = prefetcher.Prefetcher(
      self._reader,
      self._learner.put,
      self.updates,
      config.max_policy_lag,
      self._given_out,
    )
    self._publish(self._learner.snapshot(self._state).params)
    running: collections.deque[tuple[losses.Metrics, transport.Batch]]
    running = collections.deque()
    next_save = time.monotonic() + config.checkpoint_interval
    taken_at = time.monotonic()
    try:
      item = None
      while self.frames < total:
        if item is None and not self._should_stop():
          item = batches.get(timeout=0.5)
        verdict = self._agreement.decide(item is not None, self._should_stop())
        watch.charge('wait')
        if verdict is agreement_lib.Verdict.STOP:
          break
        if verdict is agreement_lib.Verdict.GO:
          assert item is not None
          batch, rows = item
          if self.updates == first_update:
            recorder.record(self.updates, 'starting: compiling the update')
          header = self._reader.layout.header(batch.rows)
          recorder.take_batch(self.updates, header['version'], header['task_id'])
          with self._agreement.updating():
            self._state, params, metrics = self._learner.update(self._state, rows)
          del rows
          item = None
          self.updates += 1
          running.append((metrics, batch))
          if len(running) > 1:
            self._finish(*running.popleft())
          watch.charge('update')
          if self.updates % config.publish_interval == 0 or self.frames >= total:
            self._publish(params)
          watch.charge('publish')
          taken_at = time.monotonic()
        elif item is None and time.monotonic() > taken_at + _SILENCE:
          self._check_policy()
          taken_at = time.monotonic()
        recorder.maybe_record(self.updates)
        now = time.monotonic()
        if self._saver is not None and now >= next_save and not self._saver.busy:
          self._save(self._saver)
          next_save = now + config.checkpoint_interval
          watch.charge('checkpoint')
    finally:
      batches.close()
      while running:
        self._finish(*running.popleft())
      watch.charge('update')
    self._check_skipped()
    if self._saver is not None:
      self._save(self._saver)
      self._saver.wait()
      watch.charge('checkpoint')
    recorder.end()

  def _publish(self, params: types.Nest) -> None:
    copy = functools.partial(learner_lib.to_host, params)
    self._control.publish(self.updates, copy)

  def _finish(self, metrics: losses.Metrics, batch: transport.Batch) -> None:
    with self._agreement.updating():
      jax.block_until_ready(metrics)
    batch.release()
    self._recorder.metrics = metrics
    if 'culprit' in metrics:
      self._culprits.append(metrics['culprit'])
      if len(self._culprits) == _WINDOW:
        self._check_skipped()

  def _check_policy(self) -> None:
    """Whether that nothing comes is this learner's own doing."""
    refused, self._refused = self._refused, self._reader.stats().refused
    if refused == self._refused:
      return
    params = learner_lib.to_host(self._state.params)
    if not self._learner.speaks(params):
      raise NotFinite(
        f'no unroll can be used: the policy of update {self.updates} is not finite. '
        'Look at optimizer.learning_rate and at the weights of the loss'
      )

  def _check_skipped(self) -> None:
    """Looks at the updates since the last look."""
    culprits, self._culprits = self._culprits, []
    if not culprits:
      return
    before = self._skipped
    self._skipped = int(learner_lib.to_host(self._recorder.metrics['skipped']))
    count = self._skipped - before
    if 2 * count < len(culprits):
      return
    first = next(i for x in culprits if (i := int(learner_lib.to_host(x))))
    suspects = learner_lib.suspects(self._learner.template(), self._recorder.metrics)
    raise NotFinite(
      f'{count} of the last {len(culprits)} updates were skipped: {suspects[first]} '
      'was not finite. Look at optimizer.learning_rate, at the weights of the loss and '
      'at what the environment gives; the parameters are as they were before'
    )

  def _save(self, saver: checkpointing.Saver) -> None:
    copy = self._learner.snapshot(self._state)
    metadata = {
      'updates': self.updates,
      'frames': self.frames,
      'wall_seconds': self._recorder.wall_seconds,
      'episodes': self._recorder.episodes,
      'config': config_lib.to_dict(self._config),
    }
    saver.save(self.updates, lambda: learner_lib.to_host(copy), metadata)
