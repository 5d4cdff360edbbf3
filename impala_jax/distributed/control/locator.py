"""Where the learner of a client is, and how to connect to it."""

import contextlib
import pathlib
from typing import NamedTuple

from impala_jax import unroll_layout
from impala_jax.distributed.control import endpoints
from impala_jax.distributed.control import grpc as control_grpc
from impala_jax.distributed.transport import protocol
from impala_jax.runtime.run_directory import RunDirectory


class Locator(NamedTuple):
  """Finds the learner by files of the run directory, and connects to it.

  Attributes:
    run_dir: of the run.
    client: its index: an actor's own, 0 for the evaluator.
    transport: by which unrolls travel.
    layout: of them.
    keys: folder of the run's keys, for mutual TLS.
    patience: seconds to wait for a learner; None where nobody starts it again.
  """

  run_dir: pathlib.Path
  client: int
  transport: str
  layout: unroll_layout.UnrollLayout
  keys: pathlib.Path | None = None
  patience: float | None = None

  def address(self) -> dict[str, str] | None:
    """Where it is now, as far as is known."""
    return endpoints.read_address(self.run_dir, self.client)

  def ended(self) -> bool:
    """Whether a supervisor has ended the run."""
    return RunDirectory(self.run_dir).ended.exists()

  def control(self, address: str) -> control_grpc.Client:
    return endpoints.open_control(address, self.keys)

  def writer(self, address: str) -> contextlib.AbstractContextManager[protocol.Writer]:
    return endpoints.open_writer(self.transport, address, self.layout, self.keys)
