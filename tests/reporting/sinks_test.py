"""Where records go."""

import json
import math

import pytest

from impala_jax.reporting import record, sinks
from impala_jax.runtime import files
from tests.reporting import records


def test_a_writer_leaves_lines_that_everybody_reads(tmp_path):
  writer = sinks.RecordWriter(tmp_path, tensorboard=False)
  made = records.make(
    frames=1, level_returns={'a': 2.5}, metrics={'kl': math.nan, 'own': 2.0}
  )
  status = record.Status(
    record=made,
    bottleneck='none',
    total_frames=9,
    seconds_left=None,
    environment_steps=3,
    given_up=[],
    peers=[record.Heard('actor', 2, 0.5)],
  )
  writer.write(status)
  writer.write(status, line=False)  # Nothing new but who is there.
  writer.close()
  lines = tmp_path / 'metrics.jsonl'
  lines.write_text(lines.read_text() + '{"frames": 2, "lo')
  (line,) = files.read_json_lines(lines)
  assert line['frames'] == 1
  assert (line['kl'], line['own'], line['episode_return/a']) == (None, 2.0, 2.5)
  assert not line.keys() & {'level_returns', 'metrics', 'episode_return', 'score/'}
  status = json.loads((tmp_path / 'status.json').read_text())
  assert status == {
    **line,
    'bottleneck': 'none',
    'total_frames': 9,
    'seconds_left': None,
    'environment_steps': 3,
    'given_up': [],
    'peers': [{'role': 'actor', 'index': 2, 'silent_seconds': 0.5}],
    'refused': [],
  }


def _status(updates, frames, **fields):
  return record.Status(
    record=records.make(updates=updates, frames=frames, **fields),
    bottleneck='none',
    total_frames=9,
    seconds_left=None,
    environment_steps=3,
    given_up=[],
    peers=[],
  )


def _run(path, *made, checkpoint=None, tensorboard=False):
  writer = sinks.RecordWriter(path, checkpoint or {}, tensorboard)
  for one in made:
    writer.write(_status(*one))
  writer.close()
  return writer


def test_a_run_that_goes_on_forgets_what_came_after_its_checkpoint(tmp_path):
  _run(tmp_path, (0, 0), (2, 40), (4, 80), (5, 100))
  metrics, evaluations = tmp_path / 'metrics.jsonl', tmp_path / 'evaluations.jsonl'
  before = metrics.read_text()
  metrics.write_text(before + '{"updates": 6, "fra')
  evaluations.write_text(
    ''.join(json.dumps({'version': v, 'frames': 20 * v}) + '\n' for v in (1, 4, 5))
  )
  # A batch of 8 instead of 4.
  writer = _run(tmp_path, (5, 120), checkpoint={'updates': 4, 'frames': 80})
  assert writer.last == json.loads(before.splitlines()[2])
  frames = [r['frames'] for r in files.read_json_lines(metrics)]
  assert frames == [0, 40, 80, 120]
  assert [e['version'] for e in files.read_json_lines(evaluations)] == [1, 4]
  # Nothing is lost.
  lost = (tmp_path / 'metrics.cut.jsonl').read_text()
  assert lost == before.splitlines()[3] + '\n{"updates": 6, "fra\n'
  lost = (tmp_path / 'evaluations.cut.jsonl').read_text()
  assert json.loads(lost)['version'] == 5


@pytest.mark.parametrize(
  'half', ['{', '{"updates": 1}', '\0\0\0', '{"updates": 1, "fr']
)
def test_a_half_written_line_does_not_swallow_the_next(tmp_path, half):
  _run(tmp_path, (1, 20))
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text() + half)
  _run(tmp_path, (2, 40), checkpoint={'updates': 1, 'frames': 20})
  lines = path.read_text().splitlines()
  assert [json.loads(line)['updates'] for line in lines] == [1, 2]


def test_strange_lines_of_before_stand_and_end_nobody(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  strange = '\udcff\n[]\n7\n{"updates": null}\n{"updates": "many"}\nnot JSON\n'
  path.write_text(strange, errors='surrogateescape')
  _run(tmp_path, (1, 20))
  assert path.read_text(errors='surrogateescape').startswith(strange)
  assert files.read_json_lines(path)[-1]['frames'] == 20
  assert not (tmp_path / 'metrics.cut.jsonl').exists()


def test_tensorboard_drops_what_came_after_the_checkpoint(tmp_path):
  event_accumulator = pytest.importorskip(
    'tensorboard.backend.event_processing.event_accumulator'
  )
  made = [(0, 0), (2, 40), (4, 80), (5, 100)]
  _run(tmp_path, *made, tensorboard=True)
  # Files are named after the second, and read in that order.
  (first,) = (tmp_path / 'tensorboard').iterdir()
  first.rename(first.with_name('events.out.tfevents.0000000001.here'))
  checkpoint = {'updates': 4, 'frames': 80}
  _run(tmp_path, (5, 90), checkpoint=checkpoint, tensorboard=True)
  found = event_accumulator.EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
  assert [(s.step, s.value) for s in found.Scalars('updates')] == [
    (0, 0), (40, 2), (80, 4), (90, 5),
  ]  # fmt: skip


def test_one_that_must_not_write_writes_nothing(tmp_path):
  def check():
    raise RuntimeError('another one runs')

  writer = sinks.RecordWriter(tmp_path, tensorboard=False, check=check)
  with pytest.raises(RuntimeError, match='another one'):
    writer.write(_status(1, 20))
  writer.close()
  assert (tmp_path / 'metrics.jsonl').read_text() == ''
  assert not (tmp_path / 'status.json').exists()


def test_a_board_that_cannot_be_written_holds_up_nobody(tmp_path, caplog):
  """Its thread dies on a full disk; what is put into its queue then stays there."""
  writer = sinks.RecordWriter(tmp_path)
  worker = writer._board.file_writer.event_writer._worker
  worker.stop()
  worker.join(60)
  status = record.Status(
    record=records.make(frames=1),
    bottleneck='none',
    total_frames=9,
    seconds_left=None,
    environment_steps=3,
    given_up=[],
    peers=[],
  )
  for _ in range(20):  # More than the queue holds.
    writer.write(status)
  writer.close()
  assert caplog.text.count('TensorBoard has no more') == 1
  assert len(files.read_json_lines(tmp_path / 'metrics.jsonl')) == 20
