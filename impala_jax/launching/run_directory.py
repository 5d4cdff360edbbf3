"""Creates a run directory, or opens one to go on from."""

import datetime
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from impala_jax import config as config_lib
from impala_jax.launching import run_name
from impala_jax.learning import own_checkpoints
from impala_jax.runtime import checkpoint_files, files, versions
from impala_jax.runtime.run_directory import RunDirectory


class RunDirectoryError(Exception):
  """The directory cannot be used; says why."""


def create(config: config_lib.Config, path: str) -> pathlib.Path:
  """Makes a new run directory with `config.json`.

  Args:
    config: what will run.
    path: the directory; empty for `runs/<name>-<levels>-<time>`.

  Raises:
    RunDirectoryError: it holds a run already, or cannot be written.
  """
  if path:
    run_dir = pathlib.Path(path)
  else:
    levels = files.as_name('-'.join(config.environment.levels[:3]))
    stamp = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
    run_dir = pathlib.Path('runs') / f'{config.name}-{levels}-{stamp}'
  check(path)
  try:
    run_dir.mkdir(parents=True, exist_ok=True)
    # Of two that want the same directory at once, one makes it.
    with open(RunDirectory(run_dir).config, 'x'):
      pass
    _write(run_dir, config, launches=0)
  except OSError as e:
    if isinstance(e, FileExistsError) and RunDirectory(run_dir).config.exists():
      raise RunDirectoryError(
        f'--run_dir={run_dir}: holds a run already; add --resume to go on with it'
      ) from None
    raise RunDirectoryError(f'cannot write {files.explain(e)}') from e
  return run_dir


def check(path: str) -> None:
  """Raises RunDirectoryError where `create` could not make a directory of that name."""
  run_dir = parent = pathlib.Path(path)
  try:
    if path and RunDirectory(run_dir).config.exists():
      raise RunDirectoryError(
        f'--run_dir={path}: holds a run already; add --resume to go on with it'
      )
    while not parent.exists():
      parent = parent.parent
  except OSError as e:
    raise RunDirectoryError(f'cannot write {files.explain(e)}') from e
  if not parent.is_dir():
    raise RunDirectoryError(f'--run_dir={path}: {parent} is no directory')
  if not os.access(parent, os.W_OK):
    raise RunDirectoryError(f'--run_dir={path}: {parent} cannot be written')


def open_existing(path: str) -> tuple[pathlib.Path, config_lib.Config]:
  """The run directory and configuration of a run to resume."""
  if not path:
    raise RunDirectoryError(
      '--resume needs --run_dir: the directory of the run that is to go on'
    )
  run_dir = pathlib.Path(path)
  try:
    saved = json.loads(RunDirectory(run_dir).config.read_text())
    return run_dir, config_lib.from_dict(saved['config'])
  except OSError as e:
    raise RunDirectoryError(
      f'--resume: no run in {path!r} ({e.strerror}: config.json)'
    ) from e
  except (ValueError, KeyError, TypeError, RecursionError) as e:
    raise RunDirectoryError(
      f'--resume: {run_dir}/config.json is unreadable: {e}'
    ) from e


class Standing(NamedTuple):
  """Where a run that is to go on stands.

  Attributes:
    newest: what it goes on from; None where it begins at 0.
    unsound: other files, with what is wrong.
    elsewhere: the checkpoints cannot be read from here.
  """

  newest: checkpoint_files.Stored | None = None
  unsound: Sequence[tuple[pathlib.Path, str]] = ()
  elsewhere: bool = False

  def describe(self, config: config_lib.Config) -> str:
    """For people, in a line for each thing."""
    lines = [f'not used: {why}' for _, why in self.unsound]
    if self.elsewhere:
      return 'goes on from the newest sound checkpoint in its volume'
    if self.newest is None:
      return '\n'.join([*lines, 'there is no checkpoint: begins at 0'])
    frames, total = self.newest.metadata['frames'], config.learner.total_frames
    lines.append(
      f'goes on from {self.newest.path.name}: {self.newest.metadata["updates"]:,} '
      f'updates, {frames:,} of {total:,} frames'
      + (': all are done, more need --total_frames' if frames >= total else '')
    )
    return '\n'.join(lines)


def judge(
  run_dir: pathlib.Path,
  saved: config_lib.Config,
  config: config_lib.Config,
  anew: bool = False,
  elsewhere: bool = False,
) -> Standing:
  """Whether a run can go on with some settings; writes nothing.

  Args:
    run_dir: of the run.
    saved: its settings so far.
    config: those with which it is to go on.
    anew: begin at 0 where no checkpoint is sound.
    elsewhere: the checkpoints cannot be read from here.

  Raises:
    RunDirectoryError: no checkpoint is sound; or there are such, and `anew`.
    ConfigError: lists all settings that cannot change, each with what it was.
  """
  if elsewhere:
    if anew:
      raise RunDirectoryError(
        '--start_anew: the checkpoints of this run are in a volume that cannot be '
        'reached from here; begin in a new --run_dir'
      )
    _raise_differences('the run', config_lib.to_dict(saved), config)
    return Standing(elsewhere=True)
  run = RunDirectory(run_dir)
  found = own_checkpoints.survey(run, saved)
  if not found.sound:
    # What was changed by mistake can be changed back.
    found = own_checkpoints.survey(run, config)
  if anew:
    if found.newest is not None:
      raise RunDirectoryError(
        f'--start_anew: {found.newest.path} is sound: go on from it without this flag, '
        'or begin in a new --run_dir'
      )
    return Standing(None, found.others)
  try:
    found.raise_if_none_is_sound()
  except checkpoint_files.CheckpointError as e:
    raise RunDirectoryError(f'--resume: {e}') from e
  if found.newest is not None:
    was = found.newest.metadata.get('config', config_lib.to_dict(saved))
    _raise_differences(found.newest.path.name, was, config)
  return Standing(found.newest, found.others)


def _raise_differences(what: str, was: Any, config: config_lib.Config) -> None:
  if problems := config_lib.what_differs(was, config):
    raise config_lib.ConfigError(
      f'--resume: {what} was trained with other settings:\n  ' + '\n  '.join(problems)
    )


def begin(run_dir: pathlib.Path, config: config_lib.Config, launch: int) -> None:
  """Notes that the launch of that number has the directory now."""
  _write(run_dir, config, launch + 1)
  run_name.ensure(run_dir)
  RunDirectory(run_dir).begin_launch()


def _write(run_dir: pathlib.Path, config: config_lib.Config, launches: int) -> None:
  files.write_json(
    RunDirectory(run_dir).config,
    {
      'config': config_lib.to_dict(config),
      'launches': launches,
      'command': sys.argv,
      'git': _git_hash(),
      'versions': versions.installed(),
    },
  )


def _git_hash() -> str:
  """Commit of the source tree, with `+changes` where it is not clean."""
  root = pathlib.Path(__file__).resolve().parent
  try:
    run = lambda *a: subprocess.run(
      ('git', '-C', str(root), *a),
      capture_output=True,
      text=True,
      errors='replace',
      check=True,
      timeout=10,
    ).stdout.strip()
    return run('rev-parse', 'HEAD') + (
      '+changes' if run('status', '--porcelain') else ''
    )
  except (OSError, subprocess.SubprocessError):
    return 'unknown'
