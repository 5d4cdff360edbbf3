"""Who runs in a run directory: one launch at a time, by files alone.

Launches are numbered. One owns the directory from the moment at which its file is
there, which of all processes on all hosts exactly one can make, also on NFS; the newest
is the owner. Its main process changes that file every `BEAT` seconds, so that others,
whose clocks and process numbers are not the same, see it live. Processes of an earlier
launch that were thought dead find a newer file and end. Whether an owner is alive,
which may have to be asked of Slurm, is `launching.backends.ownership`'s to say.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import threading
import time
from typing import Any, Self

import psutil

from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory

BEAT = 5.0  # Seconds.
_SILENT = 4 * BEAT  # Seconds without a beat after which one is taken to be dead.
_INCARNATIONS = 1000  # Of one launch.


class LeaseError(RuntimeError):
  """A newer launch, or a newer start of the same process, has the run directory."""


@dataclasses.dataclass(frozen=True)
class Owner:
  """A launch, and its main process."""

  launch: int
  launcher: str = ''  # A backend's name, or 'Python'; empty where nobody said.
  since: float = 0.0  # Unix time, seconds.
  directory: str = ''  # That it owns, as it calls it.
  host: str = ''  # For people.
  place: str = ''  # Where `pid` means this process, see `_place`.
  pid: int = 0
  created: float = 0.0  # Of the process; numbers are used again.
  beats: int = 0
  released: bool = False  # It has ended, and nothing of it is left.

  @property
  def here(self) -> bool:
    """Whether its process would be seen from here."""
    return self.place == _place()


def first_incarnation(launch: int) -> int:
  """Of the processes of a launch: above all that earlier launches have used."""
  return _INCARNATIONS * launch


def launch_of(incarnation: int) -> int:
  return incarnation // _INCARNATIONS


def newest(run: RunDirectory) -> Owner | None:
  """The owner, alive or not; None where there was none."""
  number = _newest_number(run)
  return None if number < 0 else read(run, number)


def read(run: RunDirectory, launch: int) -> Owner:
  """One that is being written at this moment says nothing but its number."""
  found = files.read_json(run.owner(launch))
  found = found if isinstance(found, dict) else {}
  known = {f.name for f in dataclasses.fields(Owner)}
  return Owner(**{**{k: v for k, v in found.items() if k in known}, 'launch': launch})


def make(run: RunDirectory, launch: int, launcher: str) -> bool:
  """Whether this process has become the owner; else another was faster."""
  path = run.owner(launch)
  path.parent.mkdir(parents=True, exist_ok=True)
  owner = Owner(launch, launcher, time.time(), **_this_process(run))
  try:
    with open(path, 'x') as f:
      f.write(json.dumps(dataclasses.asdict(owner)))
  except FileExistsError:
    return False
  for old in path.parent.glob('*.json'):
    if _number(old) < launch:
      old.unlink(missing_ok=True)
  return True


def is_copied(run: RunDirectory, owner: Owner) -> bool:
  """Whether the owner's file came here with a copy of the directory that it owns."""
  home = RunDirectory(pathlib.Path(owner.directory))
  try:
    return (
      bool(owner.directory)
      and not home.path.samefile(run.path)
      and read(home, owner.launch).since == owner.since
    )
  except OSError:  # The directory was moved, or others call it by another name.
    return False


def release(run: RunDirectory, launch: int) -> None:
  """Nothing of this launch is left."""
  if run.owner(launch).exists():
    owner = dataclasses.replace(read(run, launch), released=True)
    files.write_json(run.owner(launch), dataclasses.asdict(owner))


def beats(run: RunDirectory, owner: Owner, seconds: float = _SILENT) -> bool:
  """Whether an owner whose process is out of sight shows a sign of life in time."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if newest(run) != owner:
      return True
    time.sleep(min(1.0, seconds / 10))
  return False


def superseded(run: RunDirectory, launch: int) -> bool:
  """Whether a newer launch has the directory; one look at one file where none has."""
  return not run.owner(launch).exists() and _newest_number(run) > launch


def check(run: RunDirectory, role: str, index: int, incarnation: int) -> None:
  """Raises LeaseError where a process that writes was replaced behind its back.

  It may have been stopped, or cut off, for so long that it was taken to be dead.
  """
  if _newest_number(run) > launch_of(incarnation):
    raise LeaseError(f'{run.path} belongs to a newer launch: this one writes no more')
  if (found := run.incarnation(role, index)) > incarnation:
    raise LeaseError(
      f'{role} {index} was started again (incarnation {found}): this one, '
      f'{incarnation}, writes no more'
    )


class Heart:
  """Beats for the owner while the context lasts, in a thread.

  Args:
    run: its directory.
    launch: of this process.
  """

  def __init__(self, run: RunDirectory, launch: int):
    self._run = run
    self._launch = launch
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._work, name='heart', daemon=True)

  def __enter__(self) -> Self:
    # At once: from now on this process is the one that is looked for.
    self._run.owner(self._launch).parent.mkdir(parents=True, exist_ok=True)
    self._beat()
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._stop.set()
    self._thread.join()

  def _work(self) -> None:
    while not self._stop.wait(BEAT):
      # A disk that is full for a moment ends nobody.
      with contextlib.suppress(OSError):
        self._beat()

  def _beat(self) -> None:
    if _newest_number(self._run) > self._launch:
      # A beat of ours may have crossed the newer launch, which had deleted it.
      self._run.owner(self._launch).unlink(missing_ok=True)
      return
    before = read(self._run, self._launch)
    owner = dataclasses.replace(
      before,
      **_this_process(self._run),
      since=before.since or time.time(),
      beats=before.beats + 1,
      released=False,
    )
    files.write_json(self._run.owner(self._launch), dataclasses.asdict(owner))


def _newest_number(run: RunDirectory) -> int:
  """-1 where there is none."""
  folder = run.owner(0).parent
  return max(map(_number, folder.glob('*.json')), default=-1)


def _number(path: pathlib.Path) -> int:
  return int(path.stem) if path.stem.isdecimal() else -1


def _this_process(run: RunDirectory) -> dict[str, Any]:
  me = psutil.Process()
  return {
    'directory': str(run.path.absolute()),
    'host': socket.gethostname(),
    'place': _place(),
    'pid': me.pid,
    'created': me.create_time(),
  }


def _place() -> str:
  """Host, boot and namespace within which a process number means one process.

  Names of hosts alone are not enough: containers and clusters have them alike.
  """
  words = [socket.gethostname()]
  with contextlib.suppress(OSError):
    words.append(pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip())
    words.append(os.readlink('/proc/self/ns/pid'))
  return ' '.join(words)
