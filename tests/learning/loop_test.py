"""The learner's loop: which parameters are published, saved and gone on from."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from impala_jax import config as config_lib
from impala_jax import optimizers, types
from impala_jax.distributed.control import board
from impala_jax.distributed.transport import local as local_transport
from impala_jax.distributed.transport import protocol as transport
from impala_jax.learning import checkpointing, loop, recorder
from impala_jax.learning import learner as learner_lib
from tests import synthetic

_VERSIONS = (0, 0, 1, 2, 1, 5, 3)  # Of the parameters behind each batch.


def _config(updates: int) -> config_lib.Config:
  frames = updates * synthetic.config().frames_per_update
  return synthetic.config(
    learner__total_frames=str(frames),
    learner__publish_interval='2',
    # The last record is of all updates, however slow they are compiled.
    learner__metrics_interval='1000',
  )


class _Control(board.Board):
  """Keeps copies of all that was published."""

  def __init__(self) -> None:
    super().__init__()
    self.published: list[tuple[int, types.Nest]] = []

  def publish(self, version: int, copy: Callable[[], types.Nest]) -> None:
    super().publish(version, copy)
    found = self.fetch(-1)
    assert found is not None
    self.published.append((found[0], jax.tree.map(np.copy, found[1])))


def _run(
  directory: Any, first: int, last: int, resume: checkpointing.Checkpoint | None = None
) -> tuple[_Control, list[dict[str, Any]]]:
  """Updates first + 1 to last, of batches `first` to `last - 1`."""
  queue = local_transport.LocalTransport(synthetic.layout(), 4, 4 * len(_VERSIONS))
  writer = queue.writer()
  for i in range(first, last):
    for row in synthetic.rows(i, sequence=4 * i, version=_VERSIONS[i]):
      writer.write(row, timeout=1.0)
  control = _Control()
  records: list[dict[str, Any]] = []
  saver = checkpointing.Saver(directory, keep=9)
  # One learner for runs of any length, as if it had always been a long one.
  learner = synthetic.make_learner(synthetic.config())
  recorded = recorder.Recorder(
    _config(last),
    control,
    queue.stats,
    resume=resume,
    on_record=lambda status: records.append(status.record.flat()),
  )
  trains = loop.LearnerLoop(
    _config(last), learner, queue, control, recorded, saver, resume
  )
  trains.run()
  recorded.last_record(trains.updates)
  saver.close()
  queue.close()
  assert trains.updates == last
  return control, records


def _expected() -> list[learner_lib.LearnerState]:
  """The state after each number of updates."""
  learner = synthetic.make_learner(synthetic.config())
  state = learner.init(synthetic.config().seed)
  states = [jax.tree.map(np.copy, learner_lib.to_host(state))]
  for i in range(len(_VERSIONS)):
    state, _, _ = learner.update(state, learner.put(synthetic.rows(i)))
    states.append(jax.tree.map(np.copy, learner_lib.to_host(state)))
  return states


def _same(found: types.Nest, expected: types.Nest) -> None:
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_each_version_is_the_parameters_after_so_many_updates(tmp_path):
  states = _expected()
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), states[0].params, states[1][0])
  assert min(jax.tree.leaves(moved)) > 0

  control, records = _run(tmp_path, 0, 5)
  assert [version for version, _ in control.published] == [0, 2, 4, 5]
  for version, params in control.published:
    _same(params, states[version].params)
  assert records[-1]['updates'] == 5
  assert records[-1]['frames'] == 5 * 20
  lag = [i - _VERSIONS[i] for i in range(5)]
  # The first record is written while the first update is compiled.
  assert records[-1]['policy_lag_max'] == max(lag)
  np.testing.assert_allclose(records[-1]['policy_lag_mean'], np.mean(lag))
  assert records[-1]['learning_rate'] == optimizers.learning_rate_at(_config(5), 5)

  # And on from there, in a process of its own.
  learner = synthetic.make_learner(synthetic.config())
  resume = checkpointing.latest(tmp_path, learner.template())
  assert resume is not None
  assert resume.metadata['updates'] == 5
  _same(resume.state, states[5])
  control, records = _run(tmp_path, 5, 7, resume)
  assert [version for version, _ in control.published] == [5, 6, 7]
  for version, params in control.published:
    _same(params, states[version].params)
  assert records[-1]['frames'] == 7 * 20
  assert records[-1]['policy_lag_max'] == 6 - _VERSIONS[6]


@pytest.mark.parametrize('batch', [2, 8])
def test_frames_go_on_from_the_checkpoint_whatever_a_batch_is_now(tmp_path, batch):
  _run(tmp_path, 0, 5)
  resume = checkpointing.latest(
    tmp_path, synthetic.make_learner(synthetic.config()).template()
  )
  assert (resume.metadata['updates'], resume.metadata['frames']) == (5, 100)
  config = synthetic.config(learner__batch_size=str(batch), learner__total_frames='210')
  queue = local_transport.LocalTransport(synthetic.layout(), batch, 40)
  writer = queue.writer()
  for i in range(40):  # More than are needed.
    writer.write(synthetic.rows(i, 1, sequence=i)[0], timeout=1.0)
  records: list[dict[str, Any]] = []
  control = _Control()
  recorded = recorder.Recorder(
    config,
    control,
    queue.stats,
    resume=resume,
    on_record=lambda status: records.append(status.record.flat()),
  )
  saver = checkpointing.Saver(tmp_path, 9)
  trains = loop.LearnerLoop(
    config, synthetic.make_learner(config), queue, control, recorded, saver, resume
  )
  trains.run()
  recorded.last_record(trains.updates)
  saver.close()
  queue.close()
  # 110 frames are left, in updates of 10 or 40.
  updates = 110 // (5 * batch) + (batch == 8)
  assert trains.updates == 5 + updates
  assert trains.frames == records[-1]['frames'] == 100 + updates * 5 * batch
  assert records[0]['frames'] == 100
  assert records[0]['learning_rate'] == pytest.approx(6e-4 * (1 - 100 / 210))
  assert control.published[-1][0] == trains.updates
  saved = checkpointing.read(checkpointing.paths(tmp_path)[-1])['metadata']
  assert (saved['updates'], saved['frames']) == (trains.updates, trains.frames)


class _Learner(learner_lib.Learner):
  """Updates that are only over when somebody waits for them."""

  def __init__(self, events: list[tuple[str, int]]):
    self._events = events
    self._updates = 0

  def init(self, seed: int) -> learner_lib.LearnerState:
    del seed
    return learner_lib.LearnerState(None, None, None, None)

  def snapshot(self, state: learner_lib.LearnerState) -> learner_lib.LearnerState:
    return state

  def put(self, rows: np.ndarray) -> Any:
    return rows

  def update(self, state: learner_lib.LearnerState, rows: Any) -> Any:
    del rows
    self._updates += 1
    self._events.append(('begun', self._updates))
    return state, None, {'figure': _Pending(self._events, self._updates)}


class _Pending:
  """A figure on a device that is still busy."""

  def __init__(self, events: list[tuple[str, int]], update: int):
    self._event = events, update

  def block_until_ready(self) -> '_Pending':
    events, update = self._event
    events.append(('over', update))
    return self


class _Reader(local_transport.LocalTransport):
  """Notes when each batch was given back."""

  def __init__(self, events: list[tuple[str, int]]):
    super().__init__(synthetic.layout(), 1, 1)
    self._events = events
    self._batches = 0

  def read(self, timeout: float) -> transport.Batch:
    self._batches += 1
    number = self._batches
    rows = synthetic.layout().allocate(1)
    rows[:] = 0
    return transport.Batch(rows, lambda: self._events.append(('released', number)))


def test_a_batch_is_kept_until_its_update_is_over_and_the_next_one_begins_before():
  """XLA reads its memory in place; and the device is not to wait for this thread."""
  events: list[tuple[str, int]] = []
  config = config_lib.override(_config(3), ['learner.metrics_interval=1000'])
  control, reader = board.Board(), _Reader(events)
  recorded = recorder.Recorder(config, control, reader.stats)
  loop.LearnerLoop(config, _Learner(events), reader, control, recorded).run()
  assert events == [
    ('begun', 1), ('begun', 2), ('over', 1), ('released', 1),
    ('begun', 3), ('over', 2), ('released', 2), ('over', 3), ('released', 3),
  ]  # fmt: skip


def test_a_run_that_trains_nothing_ends_with_the_first_thing_that_was_not_finite():
  """It used to end as a success after all of its frames."""
  config = config_lib.override(_config(7), ['optimizer.learning_rate=3e38'])
  learner = synthetic.make_learner(config)
  queue = local_transport.LocalTransport(synthetic.layout(), 4, 64)
  writer = queue.writer()
  for i in range(7):
    for row in synthetic.rows(i, sequence=4 * i):
      writer.write(row, 1.0)
  control = board.Board()
  recorded = recorder.Recorder(config, control, queue.stats)
  trains = loop.LearnerLoop(config, learner, queue, control, recorded)
  with pytest.raises(
    loop.NotFinite, match='7 of the last 7 updates were skipped: the new parameter'
  ):
    trains.run()
  queue.close()
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(trains.state.params))


def test_a_policy_that_cannot_act_is_found_out(monkeypatch):
  """Its actors' unrolls are refused, so no update is ever skipped."""
  monkeypatch.setattr(loop, '_SILENCE', 0.0)
  config = _config(7)
  learner = synthetic.make_learner(config)
  queue = local_transport.LocalTransport(synthetic.layout(), 4, 64)
  control = board.Board()
  recorded = recorder.Recorder(config, control, queue.stats)
  trains = loop.LearnerLoop(config, learner, queue, control, recorded)
  rows = synthetic.rows(0)
  synthetic.layout().views(rows).behaviour_log_prob[...] = np.nan
  for i, row in enumerate(rows):
    synthetic.layout().seal(row, actor_id=0, incarnation=0, sequence=i, version=0)
    queue.writer().write(row, 1.0)
  with pytest.raises(TimeoutError):
    queue.read(0.1)
  trains._check_policy()  # A stranger's unrolls say nothing of the policy.
  assert queue.stats().refused == 4
  trains._refused = 0
  state = learner_lib.to_host(trains.state)
  nan = jax.tree.map(lambda x: np.full_like(x, np.nan), state.params)
  trains._state = learner.replicate(state._replace(params=nan))
  with pytest.raises(loop.NotFinite, match='the policy of update 0 is not finite'):
    trains.run()
  queue.close()
