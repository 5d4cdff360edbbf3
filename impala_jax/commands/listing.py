"""Lists what can be asked for.

impala list configs                  # for --config
impala list suites                   # for --set environment.suite, and which are here
impala list levels --suite=doom      # for --set environment.levels, --game, --levels
impala list settings                 # for --set: type, default, meaning
impala list launchers                # for --launcher, and which is the site's
"""

import argparse
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence

from impala_jax import config as config_lib
from impala_jax import configs, suites
from impala_jax.commands import arguments, site_launcher
from impala_jax.environments import registry
from impala_jax.launching import backends

USAGE = 'WHAT [flags]'


def add_flags(parser: arguments.Parser) -> None:
  arguments.one_of(parser, 'what', 'WHAT', list(_LISTS))
  arguments.flag(
    parser,
    'suite',
    'Of levels: those of this suite alone.',
    choices=suites.names(),
    shown='all that are installed',
  )


def run(args: argparse.Namespace) -> int:
  try:
    for line in _LISTS[args.what](args):
      print(line)
  except config_lib.ConfigError as e:
    raise arguments.Mistake(str(e)) from e
  return 0


def _configs(args: argparse.Namespace) -> Iterator[str]:
  rows = []
  for name in configs.names():
    environment = configs.get(name).environment
    words = (inspect.getdoc(getattr(configs, name)) or '').splitlines()[0]
    rows.append((name, environment.suite, ','.join(environment.levels), words))
  return _table(('configuration', 'suite', 'levels', ''), rows)


def _suites(args: argparse.Namespace) -> Iterator[str]:
  for suite in suites.names():
    missing = registry.missing(suite)
    yield f'{suite:<10} ' + ('missing' if missing else 'installed')
    yield from (f'{"":10} {line}' for line in missing.splitlines())
  yield f'{"…:…":<10} package.module:attribute, one of your own'


def _levels(args: argparse.Namespace) -> Iterator[str]:
  if args.suite:
    levels = registry.levels(args.suite)
    if not levels:
      raise arguments.Mistake(registry.missing(args.suite) or 'it takes any name')
    yield from levels
    return
  for suite in suites.names():
    for level in registry.levels(suite):
      yield f'{suite:<8} {level}'


def _settings(args: argparse.Namespace) -> Iterator[str]:
  rows = []
  for info in config_lib.describe_settings():
    value = info.default
    default = ','.join(value) if isinstance(value, tuple) else str(value)
    limits = '; '.join(text for text in (info.allowed, info.kept) if text)
    meaning = info.meaning + (f' ({limits})' if limits else '')
    rows.append((info.name, info.type, default or "''", meaning))
  return _table(('setting', 'type', 'default', 'meaning'), rows)


def _launchers(args: argparse.Namespace) -> Iterator[str]:
  meanings = {
    'foreground': 'this machine, with a live view until Ctrl-C',
    'local': 'this machine, detached',
    'slurm': 'Slurm, by sbatch',
    'kubernetes': 'Kubernetes, by kubectl',
  }
  rows = [
    (name, site_launcher.missing(name) or 'available', meanings[name])
    for name in backends.LAUNCHERS
  ]
  yield from _table(('launcher', 'from this machine', ''), rows)
  yield ''
  choice = site_launcher.choose()
  yield f'without --launcher: {choice.launcher}, {choice.reason}'
  yield from (f'  {setting}' for setting in choice.settings)
  yield 'looked for: the variables IMPALA_LAUNCHER and IMPALA_LAUNCHER_SET, and'
  for path in site_launcher.files():
    yield f'  {path}' + ('' if path.exists() else ' (not there)')


_LISTS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
  'configs': _configs,
  'suites': _suites,
  'levels': _levels,
  'settings': _settings,
  'launchers': _launchers,
}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
  table = [head, *rows]
  widths = [max(len(row[i]) for row in table) for i in range(len(head) - 1)]
  for row in table:
    cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
    yield '  '.join([*cells, row[-1]]).rstrip()
