"""Checkpoints survive what disks do, and a resumed run is the same run."""

import jax
import numpy as np
import pytest

from impala_jax.learning import checkpointing
from impala_jax.learning import learner as learner_lib
from tests import synthetic


def _state(seed: int = 0) -> learner_lib.LearnerState:
  return learner_lib.to_host(synthetic.make_learner(synthetic.config()).init(seed))


def test_resumed_run_equals_the_whole_one(tmp_path):
  """2k updates at once, and k updates, a checkpoint, a new process's k updates."""
  k = 4
  # Linear decay over the run, so that a schedule that starts anew would show.
  cfg = synthetic.config(learner__total_frames=str(2 * k * 4 * 5))
  whole = synthetic.make_learner(cfg)
  state = whole.init(3)
  for i in range(2 * k):
    state, _, _ = whole.update(state, whole.put(synthetic.rows(i)))

  first = synthetic.make_learner(cfg)
  half = first.init(3)
  for i in range(k):
    half, _, _ = first.update(half, first.put(synthetic.rows(i)))
  checkpointing.save(tmp_path, k, learner_lib.to_host(half), {'updates': k})

  second = synthetic.make_learner(cfg)
  found = checkpointing.latest(tmp_path, second.template())
  assert found is not None
  assert found.metadata == {'updates': k}
  resumed = second.replicate(found.state)
  for i in range(k, 2 * k):
    resumed, _, _ = second.update(resumed, second.put(synthetic.rows(i)))
  jax.tree.map(
    np.testing.assert_array_equal,
    learner_lib.to_host(state),
    learner_lib.to_host(resumed),
  )


def test_damaged_files_are_skipped_with_a_warning(tmp_path, caplog):
  state = _state()
  good = checkpointing.save(tmp_path, 1, state, {})
  cut = checkpointing.save(tmp_path, 2, state, {})
  cut.write_bytes(cut.read_bytes()[:-100])
  flipped = checkpointing.save(tmp_path, 3, state, {})
  content = bytearray(flipped.read_bytes())
  content[-50] ^= 1
  flipped.write_bytes(content)
  (tmp_path / 'checkpoint_0000000004.msgpack').write_bytes(b'')
  found = checkpointing.latest(tmp_path, state)
  assert found is not None
  assert found.path == good
  assert len([r for r in caplog.records if 'skipped' in r.message]) == 3


def test_another_network_is_refused_by_name(tmp_path):
  state = _state()
  path = checkpointing.save(tmp_path, 1, state, {})
  wrong = state._replace(updates=np.zeros(2, np.int32))
  with pytest.raises(checkpointing.CheckpointError, match='updates'):
    checkpointing.load(path, wrong)
  wrong = state._replace(skipped=np.zeros((), np.int64))
  with pytest.raises(checkpointing.CheckpointError, match=r'skipped.*needs int64\[\]'):
    checkpointing.load(path, wrong)


def test_an_empty_directory_has_no_checkpoint(tmp_path):
  assert checkpointing.latest(tmp_path / 'none', _state()) is None


def test_saver_keeps_the_newest_and_leaves_nothing_aside(tmp_path):
  saver = checkpointing.Saver(tmp_path, keep=2)
  state = _state()
  for step in range(5):
    saver.save(step, lambda: state, {'step': step})
  saver.wait()
  saver.close()
  assert [p.name for p in sorted(tmp_path.iterdir())] == [
    'checkpoint_0000000003.msgpack',
    'checkpoint_0000000004.msgpack',
  ]


def test_a_failed_save_is_not_silent(tmp_path):
  (tmp_path / 'file').write_text('')
  saver = checkpointing.Saver(tmp_path / 'file', keep=2)
  saver.save(0, _state, {})
  with pytest.raises(OSError):
    saver.wait()
  saver.close()
