"""What every backend does, and what they share: options, state, commands.

`render` is pure: a program and options give files, whether or not the engine is
there. All else asks the engine; every command has a deadline. The state of a run
that was submitted is `launch.json` in its run directory.
"""

import abc
import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from impala_jax import config as config_lib
from impala_jax.launching import program as program_lib
from impala_jax.launching import run_name
from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory
from impala_jax.settings import NOT_EMPTY, NOT_NEGATIVE, at_least, setting, within

_GIB = within(0.1, 99_999)
# The package can be imported there, installed or not.
_ROOT = pathlib.Path(__file__).resolve().parents[3]
COMMAND_TIMEOUT = 60.0  # Seconds that an engine's command may take.


class BackendError(Exception):
  """The engine is missing, refused or did not answer; the text says what to do."""


@dataclasses.dataclass(frozen=True)
class Options:
  """What all engines are told. `--launcher_set <launcher>.<field>=<value>`."""

  python: str = setting(
    sys.executable, 'The interpreter on the nodes, or in the image.', NOT_EMPTY
  )
  setup: str = setting(
    '', 'A line of shell goes before it, such as `source venv/bin/activate`.'
  )
  learners: int = setting(1, 'So many learner processes, one a host.', at_least(1))
  learner_cpus: int = setting(8, 'Each learner has so many cores.', at_least(1))
  learner_memory_gib: float = setting(32.0, 'Each learner has so much memory.', _GIB)
  learner_gpus: int = setting(0, 'Each learner has so many GPUs.', NOT_NEGATIVE)
  learner_grace: int = setting(
    120, 'A learner has so many seconds to write a checkpoint.', at_least(1)
  )
  actor_cpus: int = setting(1, 'Each actor has so many cores.', at_least(1))
  actor_memory_gib: float = setting(3.0, 'Each actor has so much memory.', _GIB)
  actor_gpus: int = setting(
    0, 'Each actor has so many GPUs, for actor.platform=gpu.', NOT_NEGATIVE
  )
  inference_cpus: int = setting(
    4, 'Each inference server has so many cores.', at_least(1)
  )
  inference_memory_gib: float = setting(
    8.0, 'Each inference server has so much memory.', _GIB
  )
  inference_gpus: int = setting(
    0, 'Each inference server has so many GPUs.', NOT_NEGATIVE
  )
  evaluator_cpus: int = setting(1, 'The evaluator has so many cores.', at_least(1))
  evaluator_memory_gib: float = setting(3.0, 'The evaluator has so much memory.', _GIB)
  max_restarts: int = setting(
    5, 'A process is started again so often within ten minutes.', NOT_NEGATIVE
  )

  @property
  def resources(self) -> dict[str, program_lib.Resources]:
    found = {
      role: program_lib.Resources(
        cpus=getattr(self, f'{role}_cpus'),
        memory_mib=round(1024 * getattr(self, f'{role}_memory_gib')),
        gpus=getattr(self, f'{role}_gpus', 0),
      )
      for role in ('learner', 'actor', 'inference', 'evaluator')
    }
    return found | {'all': found['learner']}


@dataclasses.dataclass(frozen=True)
class Task:
  """One replica as the engine sees it."""

  role: str
  index: int
  state: str  # 'pending', 'running', 'done' or 'failed'.
  where: str = ''  # Host.
  detail: str = ''  # The engine's own words; for a failure, its cause.


@dataclasses.dataclass
class Launch:
  """A submitted run: what `launch.json` holds.

  Attributes:
    launcher: name of the backend.
    options: fields of its options.
    program: what was submitted, with the present number of actors.
    handles: what the engine calls the parts; the backend's own business.
  """

  launcher: str
  options: dict[str, Any]
  program: program_lib.Program
  handles: dict[str, Any]

  @property
  def run(self) -> RunDirectory:
    return RunDirectory(pathlib.Path(self.program.run_dir))

  @property
  def run_dir(self) -> pathlib.Path:
    return self.run.path

  def write(self) -> None:
    """Raises BackendError where it cannot."""
    data = {
      'launcher': self.launcher,
      'options': self.options,
      'program': program_lib.to_dict(self.program),
      'handles': self.handles,
    }
    try:
      files.write_json(self.run.launch, data)
    except OSError as e:
      raise BackendError(f'cannot write {self.run.launch}: {e.strerror}') from e


def read_launch(run_dir: pathlib.Path) -> Launch:
  """Raises BackendError where nothing was submitted from `run_dir`."""
  path = RunDirectory(run_dir).launch
  try:
    data = json.loads(path.read_text())
    launch = Launch(
      data['launcher'],
      data['options'],
      program_lib.from_dict(data['program']),
      data['handles'],
    )
  except OSError as e:
    raise BackendError(
      f'no launched run in {str(run_dir)!r} ({e.strerror}: launch.json)'
    ) from e
  except (ValueError, KeyError, TypeError, RecursionError) as e:
    raise BackendError(f'{path} is unreadable: {e!r}') from e
  if run_name.is_copy(run_dir, launch.run_dir, launch.program.name):
    raise BackendError(
      f'no launched run in {str(run_dir)!r}: it is a copy of {str(launch.run_dir)!r}'
    )
  return launch


class Backend(abc.ABC):
  """One engine.

  Args:
    options: of this backend, checked.
  """

  name: ClassVar[str]
  # Whether checkpoints are in a volume that cannot be read from here.
  keeps_elsewhere: ClassVar[bool] = False

  def __init__(self, options: Any):
    self.options = options

  def program(
    self, config: config_lib.Config, run_dir: pathlib.Path, launches: int = 0
  ) -> program_lib.Program:
    """The run with this backend's sizes.

    Raises:
      config_lib.ConfigError, run_name.RunNameError: see there.
    """
    return program_lib.program_of(
      config,
      run_dir,
      _ROOT,
      run_name.name_of(run_dir),
      launches,
      self.options.learners,
      self.options.resources,
      float(self.options.learner_grace),
      self.options.max_restarts,
    )

  def describe(self, program: program_lib.Program) -> str:
    """All that `submit` would write and run, for `--dry_run`."""
    parts = [f'# --- {name} ---\n{text}' for name, text in self.render(program).items()]
    commands = '\n'.join(shlex.join(c) for c in self.commands(program))
    return '\n'.join([*parts, f'# --- commands ---\n{commands}'])

  @abc.abstractmethod
  def render(self, program: program_lib.Program) -> dict[str, str]:
    """Text by file name, in the order of submission. Pure.

    Raises:
      BackendError: the engine cannot hold this program.
    """

  @abc.abstractmethod
  def commands(self, program: program_lib.Program) -> list[list[str]]:
    """What `submit` runs, for people to read."""

  @abc.abstractmethod
  def submit(self, program: program_lib.Program) -> Launch:
    """Writes the files to `run_dir/launch/` and starts them.

    Raises:
      BackendError: nothing runs; what had been started was cancelled.
    """

  @abc.abstractmethod
  def status(self, launch: Launch) -> list[Task]:
    """All replicas, by role and index."""

  @abc.abstractmethod
  def scale(self, launch: Launch, role: str, replicas: int) -> str:
    """Changes the number of replicas and `launch`; returns what was done, in words."""

  @abc.abstractmethod
  def stop(self, launch: Launch) -> str:
    """Ends the run: the learner first, with a checkpoint. Bounded in time."""

  def log(self, launch: Launch, role: str, index: int, lines: int) -> str:
    """The last lines of one replica's log, from the run directory."""
    path = launch.run.log(role, index)
    try:
      return '\n'.join(path.read_text('utf-8', 'replace').splitlines()[-lines:])
    except OSError as e:
      raise BackendError(f'no log {path}: {e.strerror}') from e

  def write_files(self, program: program_lib.Program, files: dict[str, str]) -> None:
    """Raises BackendError where it cannot."""
    run = RunDirectory(pathlib.Path(program.run_dir))
    folder = run.launch_files
    try:
      folder.mkdir(parents=True, exist_ok=True)
      run.logs.mkdir(exist_ok=True)
      for name, text in files.items():
        # A script holds paths, which are bytes, whatever this terminal's language is.
        (folder / name).write_bytes(os.fsencode(text))
    except OSError as e:
      raise BackendError(f'cannot write {folder}: {e.strerror}') from e

  def new_launch(self, program: program_lib.Program, handles: dict[str, Any]) -> Launch:
    launch = Launch(self.name, dataclasses.asdict(self.options), program, handles)
    launch.write()
    return launch


def run_command(
  argv: Sequence[str],
  timeout: float = COMMAND_TIMEOUT,
  environment: Mapping[str, str] = os.environ,
) -> str:
  """Standard output of an engine's command.

  Raises:
    BackendError: it is not installed, failed, or took longer than `timeout` seconds.
  """
  if shutil.which(argv[0]) is None:
    raise BackendError(
      f'{argv[0]} is not on PATH here: submit from a machine that has it, or use '
      '--dry_run to see what would be submitted'
    )
  try:
    done = subprocess.run(
      argv,
      stdin=subprocess.DEVNULL,
      capture_output=True,
      encoding='utf-8',
      errors='replace',
      env=environment,
      timeout=timeout,
      check=False,
    )
  except subprocess.TimeoutExpired:
    raise BackendError(f'{argv[0]} did not answer within {timeout:.0f} s') from None
  if done.returncode != 0:
    words = (done.stderr or done.stdout).strip().splitlines()
    raise BackendError(
      f'{" ".join(argv[:3])} failed: {words[-1] if words else "without a word"}'
    )
  return done.stdout
