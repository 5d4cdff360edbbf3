"""Where a run goes when nobody says `--launcher`: what the site has chosen.

`launcher.toml` in the user's or the system's configuration folder:

  launcher = "slurm"

  [slurm]                      # As --launcher_set slurm.partition=cpu
  partition = "cpu"
  learner_partition = "gpu"

The variable IMPALA_LAUNCHER names one, too, and IMPALA_LAUNCHER_SET has settings as
--launcher_set takes them, separated by spaces. The variables win over the user's file,
that over the system's, setting by setting; flags win over all.
"""

import os
import pathlib
import shlex
import shutil
import tomllib
from collections.abc import Mapping
from typing import Any, NamedTuple

from impala_jax import config as config_lib
from impala_jax.launching import backends

FOREGROUND = 'foreground'  # This machine, while a terminal shows the run.
_FILE = pathlib.Path('impala_jax', 'launcher.toml')
_PROGRAMS = {'slurm': 'sbatch', 'kubernetes': 'kubectl'}


class Choice(NamedTuple):
  """A launcher, why it is this one, and its settings as `--launcher_set` takes them."""

  launcher: str
  reason: str
  settings: tuple[str, ...] = ()


def choose(flag: str | None = None) -> Choice:
  """What `--launcher` says, else the site.

  Raises:
    config.ConfigError: a file or a variable is wrong; says which and how.
  """
  if flag == FOREGROUND:
    return Choice(FOREGROUND, 'by --launcher')
  sources = [_from_variables()]
  sources += [c for c in map(_from_file, files()) if c is not None]
  chosen = next((c for c in sources if c.launcher), None)
  if flag:
    chosen = Choice(flag, 'by --launcher')
  elif chosen is None:
    return Choice(FOREGROUND, 'nothing else is chosen')
  # The last one wins.
  settings = [s for source in reversed(sources) for s in source.settings]
  mine = [s for s in settings if s.startswith(f'{chosen.launcher}.')]
  return Choice(chosen.launcher, chosen.reason, tuple(mine))


def files() -> list[pathlib.Path]:
  """Where a file may be, the user's first, whether or not there is one."""
  user = os.environ.get('XDG_CONFIG_HOME') or os.path.expanduser('~/.config')
  system = os.environ.get('XDG_CONFIG_DIRS') or '/etc/xdg'
  folders = dict.fromkeys([user, *system.split(os.pathsep), '/etc'])
  return [pathlib.Path(folder) / _FILE for folder in folders if folder]


def missing(launcher: str) -> str:
  """Why a launcher cannot be used from this machine; empty where it can."""
  program = _PROGRAMS.get(launcher)
  if program is None or shutil.which(program):
    return ''
  return f'{program} is not on PATH'


def _from_variables() -> Choice:
  launcher = os.environ.get('IMPALA_LAUNCHER', '')
  if launcher:
    _check('IMPALA_LAUNCHER', launcher)
  variable = os.environ.get('IMPALA_LAUNCHER_SET', '')
  try:
    settings = tuple(shlex.split(variable))
  except ValueError as e:
    raise config_lib.ConfigError(f'IMPALA_LAUNCHER_SET={variable}: {e}') from e
  return Choice(launcher, 'by the variable IMPALA_LAUNCHER', settings)


def _from_file(path: pathlib.Path) -> Choice | None:
  try:
    data = tomllib.loads(path.read_text('utf-8'))
  except (FileNotFoundError, NotADirectoryError):
    return None
  except OSError as e:
    raise config_lib.ConfigError(f'{path}: cannot be read: {e.strerror}') from e
  except ValueError as e:
    raise config_lib.ConfigError(f'{path}: is no TOML: {e}') from e
  launcher = data.pop('launcher', '')
  if launcher:
    _check(f'{path}: launcher', launcher)
  return Choice(launcher, f'by {path}', tuple(_tables(path, data)))


def _tables(path: pathlib.Path, data: Mapping[str, Any]) -> list[str]:
  settings = []
  for name, table in data.items():
    if name not in backends.LAUNCHERS or not isinstance(table, dict):
      raise config_lib.ConfigError(
        f'{path}: {name} is unknown: must be launcher = "...", or a table of one of '
        + ', '.join(backends.LAUNCHERS)
      )
    for field, value in table.items():
      if not isinstance(value, str | bool | int | float):
        raise config_lib.ConfigError(
          f'{path}: {name}.{field} is {value!r}: must be a text or a number'
        )
      settings.append(f'{name}.{field}={value}')
  return settings


def _check(source: str, launcher: object) -> None:
  if launcher not in backends.LAUNCHERS:
    raise config_lib.ConfigError(
      f'{source} is {launcher!r}: must be one of {", ".join(backends.LAUNCHERS)}'
    )
