"""Checkpoints survive what disks do, and a resumed run is the same run."""

import pathlib
from typing import Any

import jax
import msgpack
import numpy as np
import pytest

from impala_jax import config as config_lib
from impala_jax.learning import checkpointing, own_checkpoints
from impala_jax.learning import learner as learner_lib
from impala_jax.runtime import checkpoint_files
from impala_jax.runtime.run_directory import RunDirectory
from tests import synthetic

_CONFIG = synthetic.config()


def _state(seed: int = 0) -> learner_lib.LearnerState:
  return learner_lib.to_host(synthetic.make_learner(synthetic.config()).init(seed))


def _metadata(updates: int, **more: Any) -> dict[str, Any]:
  return {'updates': updates, 'frames': 20 * updates, **more}


def _forge(path: pathlib.Path, payload: bytes) -> None:
  """A file with a right checksum."""
  path.write_bytes(checkpoint_files.sealed(payload) + payload)


@pytest.fixture
def folder(tmp_path):
  """Of a run's checkpoints."""
  run = RunDirectory(tmp_path)
  run.checkpoints.mkdir()
  return run.checkpoints


def _take_over(folder: pathlib.Path) -> list[checkpoint_files.Stored]:
  return own_checkpoints.take_over(RunDirectory(folder.parent), _CONFIG).sound


def _names(directory: pathlib.Path) -> list[str]:
  return sorted(p.name.removeprefix('checkpoint_00000') for p in directory.iterdir())


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
  checkpointing.save(tmp_path, k, learner_lib.to_host(half), _metadata(k))

  second = synthetic.make_learner(cfg)
  found = checkpointing.latest(tmp_path, second.template())
  assert found is not None
  assert found.metadata == _metadata(k)
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
  good = checkpointing.save(tmp_path, 1, state, _metadata(1))
  cut = checkpointing.save(tmp_path, 2, state, _metadata(2))
  cut.write_bytes(cut.read_bytes()[:-100])
  flipped = checkpointing.save(tmp_path, 3, state, _metadata(3))
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
  path = checkpointing.save(tmp_path, 1, state, _metadata(1))
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
    saver.save(step, lambda: state, _metadata(step))
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


_FOREIGN = [
  b'',
  b'\xc1',  # Never used by msgpack.
  b'\x81' * 2000,  # Maps in maps, without an end.
  msgpack.packb(5),
  msgpack.packb([1, 2]),
  msgpack.packb({'metadata': {'updates': 9, 'frames': 9}}),
  msgpack.packb({'metadata': 'none', 'state': {}}),
  msgpack.packb({'metadata': {}, 'state': {}}),
  msgpack.packb({'metadata': {'updates': -1, 'frames': 9}, 'state': {}}),
  msgpack.packb({'metadata': {'updates': 1, 'frames': 'many'}, 'state': {}}),
  msgpack.packb({'metadata': {'updates': 1, 'frames': 2.5}, 'state': {}}),
  msgpack.packb({'metadata': {'updates': True, 'frames': 1}, 'state': {}}),
  msgpack.packb({
    'metadata': {'updates': 1, 'frames': 1, 'wall_seconds': float('nan')}, 'state': {}
  }),
  msgpack.packb({'metadata': {'updates': 9, 'frames': 9}, 'state': [1]}),
  msgpack.packb({'metadata': msgpack.ExtType(1, b'x'), 'state': {}}),
]  # fmt: skip


@pytest.mark.parametrize('payload', _FOREIGN)
def test_a_right_checksum_over_foreign_content_is_no_checkpoint(folder, payload):
  good = checkpointing.save(folder, 1, _state(), _metadata(1))
  path = folder / 'checkpoint_0000000009.msgpack'
  _forge(path, payload)
  for read in (checkpointing.read, checkpoint_files.read_metadata):
    with pytest.raises(checkpointing.CheckpointError, match='not a checkpoint'):
      read(path)
  found = checkpointing.latest(folder, _state())
  assert found is not None
  assert found.path == good
  assert [s.path for s in _take_over(folder)] == [good]
  assert _names(folder) == ['00001.msgpack', '00009.msgpack.damaged']


def test_strange_bytes_are_refused_and_nothing_else_happens(folder):
  """What a disk or a stranger does to a file: it is sound as it was, or refused."""
  rng = np.random.default_rng(14)
  good = checkpointing.save(folder, 3, {'x': np.arange(5)}, _metadata(3))
  content = good.read_bytes()
  payload = checkpoint_files.payload(good)
  path = folder / 'checkpoint_0000000009.msgpack'
  for trial in range(500):
    if trial % 2:  # With a right checksum.
      changed = bytearray(payload)
      changed[rng.integers(len(changed))] = rng.integers(256)
      _forge(path, bytes(changed[: rng.integers(1, len(changed) + 1)]))
    else:
      changed = bytearray(content)
      changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
      path.write_bytes(changed[: rng.integers(len(changed) + 1)])
    for read in (checkpointing.read, checkpoint_files.read_metadata):
      try:
        read(path)
      except checkpointing.CheckpointError:
        continue
      assert trial % 2
    assert checkpoint_files.newest(folder).path == good


@pytest.mark.parametrize('keep', [1, 2, 3])
def test_sound_files_are_never_deleted_for_unsound_ones(folder, keep):
  state = _state()
  mine = {'config': config_lib.to_dict(_CONFIG)}
  other = synthetic.config(network__hidden='7', optimizer__momentum='0.5')
  for step in (1, 3, 7):
    checkpointing.save(folder, step, state, _metadata(step, **mine))
  checkpointing.save(folder, 9_001, state, _metadata(7, **mine))  # A copy.
  (folder / 'checkpoint_0000009002.msgpack').mkdir()
  (folder / 'checkpoint_0000009003.msgpack').symlink_to('nowhere')
  for step in (2, 8, 9_000):  # Below, beside and far above those that are sound.
    damaged = checkpointing.save(folder, step, state, _metadata(step, **mine))
    damaged.write_bytes(damaged.read_bytes()[:-1])
  foreign = {'config': config_lib.to_dict(other)}
  checkpointing.save(folder, 9_999, state, _metadata(9_999, **foreign))

  sound = _take_over(folder)
  assert [s.metadata['updates'] for s in sound] == [1, 3, 7]
  aside = [n for n in _names(folder) if n.endswith('.damaged')]
  assert len(aside) == 7
  saver = checkpointing.Saver(folder, keep, sound)
  for step in (7, 10, 11):  # A run that ends at once saves the same number again.
    saver.save(step, lambda: state, _metadata(step, **mine))
    if step == 10:  # Copied there by somebody while the run goes on.
      saver.wait()
      _forge(folder / 'checkpoint_0000000500.msgpack', b'')
  saver.wait()
  saver.close()
  (folder / 'checkpoint_0000000500.msgpack').unlink()
  kept = checkpointing.paths(folder)
  assert [int(p.stem[-5:]) for p in kept] == [3, 7, 10, 11][-keep:][-3:]
  for path in kept:
    checkpointing.read(path)
  assert [n for n in _names(folder) if n.endswith('.damaged')] == aside


def test_a_run_does_not_begin_anew_by_itself(folder):
  (folder / 'checkpoint_0000000001.msgpack').symlink_to('nowhere')
  with pytest.raises(checkpointing.CheckpointError, match=r'cannot read .*1.msgpack'):
    _take_over(folder)
  (folder / 'checkpoint_0000000001.msgpack').unlink()
  path = checkpointing.save(folder, 5, _state(), _metadata(5))
  path.write_bytes(path.read_bytes()[:-1])
  (folder / 'checkpoint_0000000004.msgpack').touch()
  words = (
    r'no checkpoint in .* is sound: .*5\.msgpack is damaged.* 1 more; --resume --st'
  )
  with pytest.raises(checkpointing.CheckpointError, match=words):
    _take_over(folder)
  assert _names(folder) == ['00004.msgpack', '00005.msgpack']


def test_what_a_killed_learner_left_aside_goes(folder):
  (folder / '.checkpoint_0000000009.msgpack.1234').write_bytes(b'half')
  assert _take_over(folder) == []
  assert _names(folder) == []


def test_what_was_put_aside_before_stays(folder):
  for content in (b'one', b'two'):
    path = folder / 'checkpoint_0000000002.msgpack'
    path.write_bytes(content)
    checkpoint_files.put_aside(path, 'it is damaged')
  assert _names(folder) == ['00002.msgpack.damaged', '00002.msgpack.damaged-2']


def test_one_that_must_not_write_deletes_nothing(folder):
  for step in (1, 2):
    checkpointing.save(folder, step, _state(), _metadata(step))

  def check():
    raise RuntimeError('another one runs')

  saver = checkpointing.Saver(folder, 1, _take_over(folder), check=check)
  saver.save(3, _state, _metadata(3))
  with pytest.raises(RuntimeError, match='another one'):
    saver.wait()
  saver.close()
  assert _names(folder) == ['00001.msgpack', '00002.msgpack']


def test_sound_files_of_another_run_are_not_gone_on_from(folder):
  """Also where the other has the same network."""
  own = own_checkpoints.take_over(RunDirectory(folder.parent), _CONFIG)
  assert own.sound == []
  saver = checkpointing.Saver(folder, 3, *own)
  saver.save(4, _state, _metadata(4))
  saver.wait()
  saver.close()
  checkpointing.save(folder, 50, _state(), _metadata(50, lineage='of another'))
  checkpointing.save(folder, 2, _state(), _metadata(2))  # Of an earlier version.
  assert [s.metadata['updates'] for s in _take_over(folder)] == [2, 4]
  assert _names(folder)[-1] == '00050.msgpack.damaged'
  # What a user has copied into a directory without a run begins one.
  RunDirectory(folder.parent).lineage.unlink()
  (folder / 'checkpoint_0000000002.msgpack').unlink()
  own = own_checkpoints.take_over(RunDirectory(folder.parent), _CONFIG)
  assert own.sound[-1].metadata['lineage'] == own.lineage


@pytest.mark.parametrize(
  'state',
  [{}, {'params': 5}, {'params': {}, 'opt_state': {}, 'updates': 1}],
)
def test_a_newer_one_of_another_network_is_foreign_if_an_older_one_fits(folder, state):
  make = lambda ahead: synthetic.make_learner(_CONFIG)
  fits = checkpointing.save(folder, 3, _state(), _metadata(3))
  checkpointing.save(folder, 8, state, _metadata(8))
  sound = _take_over(folder)
  assert len(sound) == 2
  _, resume = checkpointing.go_on(sound, _CONFIG, make)
  assert resume.path == fits
  assert _names(folder) == ['00003.msgpack', '00008.msgpack.damaged']
  saver = checkpointing.Saver(folder, 2, sound)
  saver.save(9, _state, _metadata(9))
  saver.wait()
  saver.close()
  assert _names(folder)[0] == '00003.msgpack'


def test_where_none_fits_the_settings_are_wrong_not_the_files(folder):
  for step in (1, 2):
    checkpointing.save(folder, step, {'params': 5}, _metadata(step))
  make = lambda ahead: synthetic.make_learner(_CONFIG)
  with pytest.raises(checkpointing.CheckpointError, match=r'2\.msgpack is of another'):
    checkpointing.go_on(_take_over(folder), _CONFIG, make)
  assert _names(folder) == ['00001.msgpack', '00002.msgpack']
