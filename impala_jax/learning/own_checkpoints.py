"""Which checkpoints of a run directory are sound and its run's own. Needs no JAX.

Files come there by other ways, too: copied from another run, cut by a disk. They must
neither be gone on from nor count among those that are kept.
"""

import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from impala_jax import config as config_lib
from impala_jax.runtime import checkpoint_files, files
from impala_jax.runtime.run_directory import RunDirectory


class Own(NamedTuple):
  """What the one learner that writes checkpoints begins with."""

  sound: list[checkpoint_files.Stored]  # Oldest first.
  lineage: str  # What all checkpoints of the run bear, and no other's.


def survey(run: RunDirectory, config: config_lib.Config) -> checkpoint_files.Survey:
  """All checkpoints, read and judged.

  Args:
    run: its directory.
    config: of the run; a file of one that differs in what cannot change is another's.
  """
  lineage = _lineage(run)

  def foreign(metadata: Mapping[str, Any]) -> list[str]:
    # Those of earlier versions bear none.
    if lineage and (metadata.get('lineage') or lineage) != lineage:
      return ['it bears another lineage']
    return config_lib.what_differs(metadata.get('config'), config)

  return checkpoint_files.survey(run.checkpoints, foreign)


def take_over(run: RunDirectory, config: config_lib.Config) -> Own:
  """Those that are sound; all other files are renamed.

  Args:
    run: its directory, of which this process is the owner.
    config: see `survey`.

  Raises:
    CheckpointError: there are files, and none is sound: a run does not begin anew
      unless somebody says so.
  """
  found = survey(run, config)
  found.raise_if_none_is_sound()
  for path, why in found.others:
    checkpoint_files.put_aside(path, why)
  checkpoint_files.remove_unfinished(run.checkpoints)
  lineage = _lineage(run)
  if not lineage:
    before = found.newest.metadata if found.newest else {}
    lineage = str(before.get('lineage') or uuid.uuid4().hex)
    run.path.mkdir(parents=True, exist_ok=True)
    files.write_json(run.lineage, {'lineage': lineage})
  return Own(found.sound, lineage)


def _lineage(run: RunDirectory) -> str:
  return str(files.read_json(run.lineage).get('lineage', ''))
