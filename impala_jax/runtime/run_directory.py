"""The directory of a run: which file is where, and how roles and launchers agree by it.

No other module names a file of it. What processes tell each other is small JSON,
written aside and renamed: whoever reads sees a whole file or none.
"""

import dataclasses
import pathlib
import time
from typing import Any

from impala_jax.runtime import files


def process_name(role: str, index: int) -> str:
  """Actors are numbered always, other roles from the second process on."""
  return f'{role}-{index}' if role == 'actor' or index else role


@dataclasses.dataclass(frozen=True)
class RunDirectory:
  """One run's directory; nothing is read or made before a method is called."""

  path: pathlib.Path

  # What the run is.

  @property
  def config(self) -> pathlib.Path:
    """Settings under `config`, number of launches, versions and command line."""
    return self.path / 'config.json'

  @property
  def run_name(self) -> pathlib.Path:
    """The run's name, which no other run has, and the directory it was made in."""
    return self.path / 'run_name.json'

  @property
  def keys(self) -> pathlib.Path:
    """Folder of the run's keys for mutual TLS."""
    return self.path / 'keys'

  def settings(self) -> dict[str, Any]:
    """The settings in `config.json`; empty where there are none to be read."""
    found = files.read_json(self.config).get('config', {})
    return found if isinstance(found, dict) else {}

  def launches(self) -> int:
    """How often the run was launched; 0 where that cannot be read."""
    found = files.read_json(self.config)
    number = found.get('launches') if isinstance(found, dict) else 0
    return number if isinstance(number, int) else 0

  # What it leaves.

  @property
  def metrics(self) -> pathlib.Path:
    """Records of the whole run, one a line."""
    return self.path / 'metrics.jsonl'

  @property
  def tensorboard(self) -> pathlib.Path:
    return self.path / 'tensorboard'

  @property
  def checkpoints(self) -> pathlib.Path:
    return self.path / 'checkpoints'

  @property
  def lineage(self) -> pathlib.Path:
    """What the run's checkpoints bear and no other's do; a copy of the run bears it."""
    return self.path / 'lineage.json'

  @property
  def evaluations(self) -> pathlib.Path:
    """Evaluations while it trains, one a line."""
    return self.path / 'evaluations.jsonl'

  def cut(self, lines: pathlib.Path) -> pathlib.Path:
    """Where goes what is cut off `metrics` or `evaluations` as a run goes on."""
    return lines.with_suffix('.cut.jsonl')

  @property
  def learning_curve(self) -> pathlib.Path:
    return self.path / 'learning_curve.png'

  @property
  def level_curves(self) -> pathlib.Path:
    return self.path / 'level_curves.png'

  @property
  def logs(self) -> pathlib.Path:
    return self.path / 'logs'

  def log(self, role: str, index: int) -> pathlib.Path:
    return self.logs / f'{process_name(role, index)}.log'

  def unrolls(self, learner: int) -> pathlib.Path:
    """Where the unrolls of each actor process went, by one learner process."""
    return self.path / f'unrolls-{learner}.json'

  # How its processes find each other.

  def address(self, learner: int) -> pathlib.Path:
    """Where the learner process of that index writes its addresses."""
    return self.path / (f'address-{learner}.json' if learner else 'address.json')

  def inference_address(self, server: int) -> pathlib.Path:
    """Where the inference server of that index writes its address."""
    return self.path / f'inference-{server}.json'

  @property
  def gang(self) -> pathlib.Path:
    """Where learner 0 waits for the others."""
    return self.path / 'gang.json'

  # How it goes.

  @property
  def status(self) -> pathlib.Path:
    """The learner's newest record, and what only those who look on need."""
    return self.path / 'status.json'

  @property
  def ended(self) -> pathlib.Path:
    """That the run has ended: `reason` (finished, failed, stopped) and `cause`."""
    return self.path / 'ended.json'

  @property
  def launch(self) -> pathlib.Path:
    """What a launcher submitted."""
    return self.path / 'launch.json'

  @property
  def launch_files(self) -> pathlib.Path:
    """Folder of the scripts and manifests that were submitted."""
    return self.path / 'launch'

  def owner(self, launch: int) -> pathlib.Path:
    """Whether the launch of that number runs, see `runtime.lease`."""
    return self.path / 'owners' / f'{launch}.json'

  def supervised(self, role: str, index: int) -> pathlib.Path:
    """What a supervisor knows of its process: also the incarnation.

    It grows with each start on whatever host, because the next one reads it there.
    """
    return self.path / 'supervised' / f'{role}-{index}.json'

  def incarnation(self, role: str, index: int) -> int:
    """The newest of a process; -1 before the first."""
    return int(files.read_json(self.supervised(role, index)).get('incarnation', -1))

  def read_status(self) -> dict[str, Any]:
    """Empty before the learner's first word."""
    return files.read_json(self.status)

  def how_ended(self) -> dict[str, Any]:
    """`reason`, `cause` and `time`; empty while the run goes on."""
    return files.read_json(self.ended)

  def end(self, reason: str, cause: str = '') -> None:
    """Tells all supervisors that the run has ended; the first reason stands."""
    if not self.ended.exists():
      files.write_json(
        self.ended, {'reason': reason, 'cause': cause, 'time': time.time()}
      )

  def begin_launch(self) -> None:
    """Before a new launch: nothing has ended or failed; incarnations stay."""
    stale = [self.ended, self.status, *self.path.glob('address*.json')]
    for path in (*stale, *self.path.glob('inference-*.json')):
      path.unlink(missing_ok=True)
    for path in self.path.glob('supervised/*.json'):
      incarnation = files.read_json(path).get('incarnation', -1)
      files.write_json(path, {'incarnation': incarnation})
