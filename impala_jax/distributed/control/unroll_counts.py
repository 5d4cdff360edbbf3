"""Where the unrolls of each actor process went, by file, for whoever adds up.

A learner's own counts begin anew with it, and are sums over actors: over restarts only
the counts of each actor process by each learner process balance.
"""

import dataclasses
import pathlib

from impala_jax.distributed.control import protocol
from impala_jax.distributed.transport import protocol as transport
from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory


def write(
  run_dir: pathlib.Path,
  learner: int,
  control: protocol.Control,
  reader: transport.Reader,
) -> None:
  """Writes `unrolls-<learner>.json`, whole.

  Args:
    run_dir: of the run.
    learner: index of this one.
    control: knows what each actor process reported to have sent.
    reader: knows what came of it.
  """
  sent = {
    (r.index, r.incarnation): int(r.totals.get('unrolls', 0))
    for r, _ in control.peers()
    if r.role == 'actor'
  }
  writers = [
    {**dataclasses.asdict(w), 'sent': sent.get((w.actor, w.incarnation), 0)}
    for w in reader.writers()
  ]
  files.write_json(
    RunDirectory(run_dir).unrolls(learner),
    {'learner': control.identity, 'writers': writers},
  )
