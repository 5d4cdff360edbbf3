"""Where the learner of a client is, and how to connect to it."""

import contextlib
import math
import os
import pathlib
from typing import NamedTuple

from impala_jax import unroll_layout
from impala_jax.distributed.control import endpoints
from impala_jax.distributed.control import grpc as control_grpc
from impala_jax.distributed.transport import protocol as transport


def patience() -> float | None:
  """Seconds that a client waits for a learner; None where nobody restarts learners.

  Raises:
    ValueError: IMPALA_PATIENCE, which supervisors set, is no number of seconds.
  """
  text = os.environ.get('IMPALA_PATIENCE', '')
  if not text:
    return None
  try:
    seconds = float(text)
  except ValueError:
    seconds = math.nan
  if not 0 < seconds < math.inf:
    raise ValueError(f'IMPALA_PATIENCE is {text!r}: must be a number of seconds')
  return seconds


class Way(NamedTuple):
  """How to find the learner, by files of the run directory, and to connect to it.

  Attributes:
    run_dir: of the run.
    client: its index: an actor's own, 0 for the evaluator.
    layout: of the unrolls.
    keys: folder of the run's keys, for mutual TLS.
  """

  run_dir: pathlib.Path
  client: int
  layout: unroll_layout.UnrollLayout
  keys: pathlib.Path | None = None

  def address(self) -> dict[str, str] | None:
    """Where it is now, as far as is known."""
    return endpoints.read_address(self.run_dir, self.client)

  def ended(self) -> bool:
    """Whether a supervisor has ended the run."""
    return (self.run_dir / 'ended.json').exists()

  def control(self, address: str) -> control_grpc.Client:
    return endpoints.open_control(address, self.keys)

  def writer(self, address: str) -> contextlib.AbstractContextManager[transport.Writer]:
    return endpoints.open_writer(address, self.layout, self.keys)
