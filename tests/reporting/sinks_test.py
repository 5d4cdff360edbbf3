"""Where records go."""

import json
import math

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
  }


def test_a_board_that_cannot_be_written_holds_up_nobody(tmp_path, caplog):
  """Its thread dies on a full disk; what is put into its queue then stays there."""
  writer = sinks.RecordWriter(tmp_path)
  worker = writer._board.file_writer.event_writer._worker
  worker.stop()
  worker.join(60)
  status = record.Status(
    record=records.make(frames=1), bottleneck='none', total_frames=9, seconds_left=None,
    environment_steps=3, given_up=[], peers=[],
  )  # fmt: skip
  for _ in range(20):  # More than the queue holds.
    writer.write(status)
  writer.close()
  assert caplog.text.count('TensorBoard has no more') == 1
  assert len(files.read_json_lines(tmp_path / 'metrics.jsonl')) == 20
