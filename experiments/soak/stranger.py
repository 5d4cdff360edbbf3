"""What strangers, and a user by mistake, do to a run that goes on.

Each method is one misfortune; the run must go on as if nothing had been.
"""

import contextlib
import json
import pathlib
import random
import subprocess
import sys
import time

import grpc
import msgpack
import numpy as np

from impala_jax import components, unroll_layout
from impala_jax import config as config_lib
from impala_jax.distributed.control import endpoints
from impala_jax.distributed.transport import protocol as transport
from impala_jax.runtime import checkpoint_files, files
from impala_jax.runtime.run_directory import RunDirectory

ACTOR = 99  # Which the run does not have.
_LAUNCH = 120.0  # Seconds for a second launch to be refused.
_REPORTS = (
  b'\xff' * 100,
  msgpack.packb({'role': 'actor', 'events': [{}]}),
  msgpack.packb({'role': 'learner', 'totals': {'lost': 'x'}}),
  msgpack.packb(['episode', 9, float('nan')]),
  bytes(1 << 20),
)


class Stranger:
  """Reaches all ports of a run on this machine.

  Args:
    run_dir: of the run.
    seed: of what it does.
  """

  def __init__(self, run_dir: pathlib.Path, seed: int):
    self._run = RunDirectory(run_dir)
    self._random = random.Random(seed)
    self._layout: unroll_layout.UnrollLayout | None = None
    self._kind = ''
    self._sequence = 0  # Of the actor that it plays.
    self._launches: list[tuple[subprocess.Popen[str], float]] = []
    self.rows = 0  # Forged ones that were taken by the transport.
    self.refused_launches = 0

  def forge(self) -> None:
    """Rows and reports that no role would send."""
    address = endpoints.read_address(self._run.path, 0)
    if address is None:
      return
    for report in _REPORTS:
      with grpc.insecure_channel(
        address['control'], [('grpc.enable_http_proxy', 0)]
      ) as channel:
        call = channel.unary_unary('/impala_jax.Control/Report')
        with contextlib.suppress(grpc.RpcError):
          call(report, timeout=5.0)
    layout = self._form()
    far = {'actor_id': 0, 'incarnation': 0, 'sequence': 2**62, 'version': 0}
    with endpoints.open_writer(self._kind, address['transport'], layout) as writer:
      for change, header in (
        ('', far),
        ('reward', self._own()),
        ('action', self._own()),
        ('', {**self._own(), 'version': 2**50}),
      ):
        row = layout.allocate(1)[0]
        row[:] = 0
        views = layout.views(row)
        if change == 'reward':
          views.timestep.reward[0] = np.nan
        if change == 'action':
          views.action[0] = -5
        layout.seal(row, **header)
        with contextlib.suppress(TimeoutError, transport.TransportError):
          writer.write(row, 5.0)
          self.rows += 1

  def damage(self) -> None:
    """A file of a higher number than all checkpoints, which is none."""
    paths = checkpoint_files.paths(self._run.checkpoints)
    number = int(paths[-1].stem.rsplit('_', 1)[1]) if paths else 0
    path = checkpoint_files.path_of(self._run.checkpoints, number + 1000)
    with contextlib.suppress(FileExistsError), open(path, 'xb') as file:
      file.write(self._random.randbytes(4096))

  def launch_again(self) -> None:
    """By somebody who does not know that the run goes on; see `look`."""
    command = [
      sys.executable, '-m', 'impala_jax', 'train', '--resume', '--launcher=local',
      f'--run_dir={self._run.path}',
    ]  # fmt: skip
    process = subprocess.Popen(
      command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    self._launches.append((process, time.time() + _LAUNCH))

  def look(self) -> list[str]:
    """What is wrong with how second launches ended."""
    problems = []
    for process, deadline in list(self._launches):
      if process.poll() is None:
        if time.time() < deadline:
          continue
        process.kill()
      said = process.communicate()[0].strip()
      self._launches.remove((process, deadline))
      if process.returncode > 0 and 'already runs' in said:
        self.refused_launches += 1
      else:
        problems.append(f'a second launch ended with {process.returncode}: {said}')
    return problems

  def _own(self) -> dict[str, int]:
    self._sequence += 1
    return {
      'actor_id': ACTOR,
      'incarnation': 0,
      'sequence': self._sequence - 1,
      'version': 0,
    }

  def _form(self) -> unroll_layout.UnrollLayout:
    if self._layout is None:
      saved = json.loads(self._run.config.read_text())
      config = config_lib.from_dict(saved['config'])
      self._kind = config.transport.kind
      self._layout = components.build(config).layout
    return self._layout


def refused(run_dir: pathlib.Path) -> int:
  """Forged rows that learners counted as refused, over all of their lives."""
  counts, before = 0, 0
  for record in files.read_json_lines(RunDirectory(run_dir).metrics):
    now = int(record.get('unrolls_refused', 0))
    counts += now - before if now >= before else now
    before = now
  return counts
