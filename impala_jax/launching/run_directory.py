"""Creates a run directory, or opens one to go on from."""

import datetime
import json
import os
import pathlib
import subprocess
import sys

from impala_jax import config as config_lib
from impala_jax.runtime import files, versions
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
    _write(run_dir, config, launches=0)
  except OSError as e:
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


def begin(run_dir: pathlib.Path, config: config_lib.Config) -> int:
  """Notes one more launch; returns how many there were before."""
  saved = json.loads(RunDirectory(run_dir).config.read_text())
  launches = int(saved.get('launches', 0))
  _write(run_dir, config, launches + 1)
  RunDirectory(run_dir).begin_launch()
  return launches


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
      check=True,
      timeout=10,
    ).stdout.strip()
    return run('rev-parse', 'HEAD') + (
      '+changes' if run('status', '--porcelain') else ''
    )
  except (OSError, subprocess.SubprocessError):
    return 'unknown'
