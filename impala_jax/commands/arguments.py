"""Flags of the commands: argparse that takes what absl's flags took.

`--flag value` and `--flag=value`; `--flag`, `--noflag` and `--flag=false` for booleans;
flags before and after other arguments.
"""

import argparse
import difflib
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from impala_jax import settings as settings_lib

_BOOLEANS = {
  **dict.fromkeys(('true', 't', '1', 'yes', 'y'), True),
  **dict.fromkeys(('false', 'f', '0', 'no', 'n'), False),
}
_KINDS: dict[Any, str] = {int: 'a whole number', float: 'a number'}
# Anything that `add_argument` can be called on.
Group = argparse._ActionsContainer


class Mistake(Exception):
  """The command cannot be carried out as it was typed; the text says why."""


class Parser(argparse.ArgumentParser):
  """Raises `Mistake` where argparse would print its usage and exit."""

  def __init__(self, **settings: Any):
    super().__init__(
      **settings,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )

  def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
    # argparse takes the value of --flag=-- for the end of flags, and leaves no value.
    if arg_strings == ['--'] and action.nargs is None:
      if not action.option_strings:
        self.error(f'{action.metavar} is missing')
      return self._get_value(action, '--')
    return super()._get_values(action, arg_strings)

  def error(self, message: str) -> NoReturn:
    raise Mistake(message)


class _Switch(argparse.Action):
  """`--name` and `--noname`; the value that `_spell_out` found."""

  def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any):
    super().__init__([f'--{dest}', f'--no{dest}'], dest, nargs=0, **settings)

  def __call__(
    self,
    parser: argparse.ArgumentParser,
    namespace: argparse.Namespace,
    values: Any,
    option_string: str | None = None,
  ) -> None:
    setattr(namespace, self.dest, option_string == f'--{self.dest}')


def flag(
  group: Group,
  name: str,
  text: str,
  default: Any = None,
  *,
  kind: Callable[[str], Any] = str,
  choices: Sequence[str] | None = None,
  least: float | None = None,
  most: float | None = None,
  many: bool = False,
  metavar: str | None = None,
  shown: str | None = None,
) -> None:
  """Adds `--name` to a parser or to a group of its flags.

  Args:
    group: parser or group.
    name: of the flag, and of the attribute that holds its value.
    text: one sentence.
    default: the value where the flag is not given.
    kind: makes the value of its text; ValueError where it cannot.
    choices: the values that there are.
    least: the lowest number that there is.
    most: the highest one; whole numbers are below 2^63 anyway.
    many: the flag may be repeated; its value is a list.
    metavar: what stands for the value; DIR and FILE are completed by shells.
    shown: the default in words, where `default` does not say it.
  """

  def convert(given: str) -> Any:
    problem = ''
    try:
      value = kind(given)
    except ValueError as e:
      problem = f'must be {_KINDS[kind]}' if kind in _KINDS else str(e)
    else:
      if choices and value not in choices:
        problem = 'must be one of ' + ', '.join(choices)
      elif least is not None and value < least:
        problem = f'must be at least {least:g}'
      elif most is not None and value > most:
        problem = f'must be at most {most:,}'
      elif kind is int and abs(value) >= 2**63:
        problem = 'must be below 2^63'
      elif kind is float and not math.isfinite(value):
        problem = 'must be finite'
    if problem:
      raise Mistake(f'--{name}={settings_lib.shown(given)[1:-1]}: {problem}')
    return value

  if default is not None and shown is None:
    shown = ','.join(default) if isinstance(default, list) else str(default)
  kinds = {int: 'N', float: 'X', names: 'A,B'}
  group.add_argument(
    f'--{name}',
    action='append' if many else 'store',
    default=[] if many and default is None else default,
    type=convert,
    choices=choices,
    metavar=metavar or (None if choices else kinds.get(kind, 'TEXT')),
    help=_help(text, shown),
  )


def one_of(parser: Parser, name: str, metavar: str, choices: Sequence[str]) -> None:
  """Adds an argument that is one of several words."""

  def convert(given: str) -> str:
    if given not in choices:
      raise Mistake(f'{metavar} is {given!r}: must be one of {", ".join(choices)}')
    return given

  parser.add_argument(
    name, type=convert, choices=choices, metavar=metavar, help=', '.join(choices)
  )


def switch(
  group: Group,
  name: str,
  text: str,
  default: bool | None = False,
  shown: str | None = None,
) -> None:
  """Adds `--name` and `--noname`; see `flag`."""
  shown = shown or ('on' if default else 'off')
  group.add_argument(
    f'--{name}', action=_Switch, default=default, help=_help(text, shown)
  )


def names(text: str) -> list[str]:
  """Of a flag that takes several names, separated by commas: each of them once."""
  found = [part.strip() for part in text.split(',')]
  if '' in found:
    raise ValueError('must be names separated by commas, none of them empty')
  if len(set(found)) < len(found):
    raise ValueError('must name each once')
  return found


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
  """All flags and arguments, those of subcommands included."""
  for action in parser._actions:
    if isinstance(action, argparse._SubParsersAction):
      for inner in action.choices.values():
        yield from actions(inner)
    else:
      yield action


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
  """The values of flags and arguments, and what was typed as `typed`, a line.

  Raises:
    Mistake: says what is wrong with one of them.
  """
  spelled = _spell_out(parser, argv)
  args, rest = parser.parse_known_intermixed_args(spelled)
  known = [option for action in parser._actions for option in action.option_strings]
  for text in rest:
    if text.startswith('-') and text != '--':
      name = text.partition('=')[0]
      near = difflib.get_close_matches(name, known, 1)
      hint = f'did you mean {near[0]}?' if near else f'{parser.prog} --help lists all'
      raise Mistake(f'unknown flag {name.lstrip("-")!r}: {hint}')
  if rest:
    raise Mistake(f'unknown arguments {rest}: flags begin with --')
  args.typed = shlex.join(argv)
  return args


def _spell_out(parser: Parser, argv: Sequence[str]) -> list[str]:
  """`--flag=false` of a boolean as `--noflag`."""
  booleans = {a.dest for a in parser._actions if isinstance(a, _Switch)}
  spelled = []
  for text in argv:
    name, given, value = text.removeprefix('--').partition('=')
    if given and text.startswith('--') and name in booleans:
      if value.lower() not in _BOOLEANS:
        raise Mistake(f'{text}: must be true or false')
      text = f'--{name}' if _BOOLEANS[value.lower()] else f'--no{name}'
    spelled.append(text)
  return spelled


def _help(text: str, shown: str | None) -> str:
  default = f' Default: {shown}.' if shown else ''
  return f'{text}{default}'.replace('%', '%%')
