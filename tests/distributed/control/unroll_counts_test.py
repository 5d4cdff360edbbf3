"""The file that says of each actor process where its unrolls went."""

import json

from impala_jax.distributed.control import board, protocol, unroll_counts
from impala_jax.distributed.transport import protocol as transport


class _Reader:
  def writers(self):
    return [
      transport.WriterStats(3, 0, 0, 9, received=7, lost=1, stale=1),
      transport.WriterStats(3, 1, 0, 2, received=2),
      transport.WriterStats(4, 0, 5, 6, received=1),
    ]


def test_what_came_stands_beside_what_was_sent(tmp_path):
  control = board.Board()
  control.report(protocol.Report('actor', 3, 0, {'unrolls': 9}))
  control.report(protocol.Report('actor', 3, 1, {'unrolls': 4}))
  control.report(protocol.Report('evaluator', 4, 0, {'unrolls': 99}))
  unroll_counts.write(tmp_path, 2, control, _Reader())
  found = json.loads((tmp_path / 'unrolls-2.json').read_text())
  assert found['learner'] == control.identity
  rows = {(w['actor'], w['incarnation']): w for w in found['writers']}
  # Only the newest process of an actor still reports.
  assert [rows[k]['sent'] for k in ((3, 0), (3, 1), (4, 0))] == [0, 4, 0]
  assert rows[3, 0] == {
    'actor': 3, 'incarnation': 0, 'first': 0, 'next': 9, 'received': 7, 'lost': 1,
    'stale': 1, 'refused': 0, 'sent': 0,
  }  # fmt: skip
