"""The console command `impala`: finds the command, says in one line what is wrong.

Exit codes: 0 done, 1 it failed, 2 a mistake in what was typed, 130 Ctrl-C. Only the
command that is asked for is imported.
"""

import argparse
import contextlib
import difflib
import importlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import machinery
from typing import Protocol, cast

import impala_jax
from impala_jax.commands import arguments
from impala_jax.runtime import files, printing, role_environment

COMMANDS = {
  'train': 'trains an agent: the main job',
  'dmlab30': 'trains one agent on many levels: DMLab-30 or Doom',
  'evaluate': "plays and scores a run's agent",
  'plot': 'draws the learning curves of a run',
  'compare': 'draws the learning curves of several runs in one picture',
  'manage': 'looks at, scales and stops a submitted run',
  'list': 'lists configs, levels, suites, settings or launchers',
  'doctor': 'says what this machine has for a run, and what it lacks',
  'fill_level_cache': 'compiles maps of DeepMind Lab ahead of a run',
  'completion': 'prints what completes all this in bash, zsh or fish',
}
_MODULES = {'list': 'listing'}  # Where it has not the command's name.
# Of `launch/`, where they have not the command's name.
_SCRIPTS = {'train': 'run_atari', 'dmlab30': 'run_dmlab30'}


class Command(Protocol):
  """A module of a command."""

  USAGE: str  # What follows the command's name.

  def add_flags(self, parser: arguments.Parser) -> None: ...

  def run(self, args: argparse.Namespace) -> int:
    """Returns the exit code. Raises `arguments.Mistake`."""


def main(argv: Sequence[str] | None = None) -> int:
  """`impala ...` and `python -m impala_jax ...`; returns the exit code."""
  printing.replace_unprintable()
  return _printed(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
  console = os.path.basename(sys.argv[0]).removesuffix('.exe') == 'impala'
  program = 'impala' if console else 'python -m impala_jax'
  name = argv[0] if argv else ''
  if name in COMMANDS:
    return _run(name, argv[1:], {x: f'{program} {x}' for x in COMMANDS})
  if name in ('', '-h', '--help', 'help'):
    print(whole_parser(program).format_help(), end='')
    return 0 if name else 2
  if name == '--version':
    print(f'impala_jax {impala_jax.__version__}')
    return 0
  near = difflib.get_close_matches(name, COMMANDS, 1)
  hint = f'did you mean {near[0]}?' if near else f'there are {", ".join(COMMANDS)}'
  print(f'impala_jax: unknown command {name!r}: {hint}', file=sys.stderr)
  return 2


def script(name: str, root: str, spec: machinery.ModuleSpec | None) -> int:
  """`launch/run_atari.py ...` and `python -m launch.run_atari ...`.

  Args:
    name: of the command.
    root: folder of the source tree, on `sys.path` already.
    spec: the script's `__spec__`, None where it was started by its path.
  """
  printing.replace_unprintable()
  # Python puts the script's own folder there, as if its scripts were packages.
  launch = os.path.join(root, 'launch')
  sys.path[:] = [p for p in sys.path if os.path.realpath(p) != launch]
  # The processes that it starts find the package, too, from whatever folder.
  more = os.environ.get('PYTHONPATH')
  os.environ['PYTHONPATH'] = os.pathsep.join([root, *([more] if more else [])])
  folder = os.path.dirname(sys.argv[0]) or os.curdir
  typed = {}
  for command in COMMANDS:
    file = _SCRIPTS.get(command, command)
    by_path = shlex.quote(os.path.join(folder, f'{file}.py'))
    typed[command] = f'python -m launch.{file}' if spec else by_path
  return _printed(lambda: _run(name, sys.argv[1:], typed))


def whole_parser(program: str, filled: Sequence[str] = ()) -> arguments.Parser:
  """The whole command line; only the commands in `filled` with their flags."""
  parser = arguments.Parser(
    prog=program,
    usage=f'{program} COMMAND [flags]',
    description='IMPALA on JAX: actors, V-trace learner, and what connects them.',
    epilog=f'{program} COMMAND --help tells more of each.',
  )
  parser.add_argument('--version', action='store_true', help='print the version')
  commands = parser.add_subparsers(title='commands', metavar='')
  for name, text in COMMANDS.items():
    command = commands.add_parser(name, help=text)
    if name in filled:
      _module(name).add_flags(command)
  return parser


def _printed(work: Callable[[], int]) -> int:
  """The exit code of `work`, once what it printed has been taken."""
  try:
    try:
      return work()
    finally:
      if sys.stdout is not None:
        sys.stdout.flush()
  except BrokenPipeError:  # Of `| head`, which has read enough.
    code = 0
  except OSError as e:
    print(f'impala_jax: standard output: {e.strerror}', file=sys.stderr)
    code = 1
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return code


def _run(name: str, argv: Sequence[str], typed: Mapping[str, str]) -> int:
  """One command; `typed` is how the user would call each of them."""
  role_environment.forget()
  # One's own suite may be a module beside which one works; last, so that nothing
  # there hides a package.
  with contextlib.suppress(OSError):
    sys.path.append(os.getcwd())
  try:
    module = _module(name)
    parser = arguments.Parser(
      prog=typed[name],
      usage=f'{typed[name]} {module.USAGE}',
      description=(module.__doc__ or '').strip(),
    )
    module.add_flags(parser)
    args = arguments.parse(parser, argv)
    args.name = name
    args.commands = typed
    return module.run(args)
  except arguments.Mistake as e:
    print(f'impala_jax: {_shortened(str(e))}', file=sys.stderr)
    return 2
  except ModuleNotFoundError as e:
    if (e.name or 'impala_jax').partition('.')[0] == 'impala_jax':
      raise
    print(
      f'impala_jax: {sys.executable} has no module {e.name!r}: install it there, or '
      'use the Python where impala_jax and its extras are installed (`make setup`)',
      file=sys.stderr,
    )
    return 2
  except KeyboardInterrupt:
    return 130
  except BrokenPipeError:
    raise
  except OSError as e:
    print(f'impala_jax: {_shortened(files.explain(e))}', file=sys.stderr)
    return 1


def _shortened(text: str) -> str:
  """Without the middle of a word that nobody would read to its end."""
  return re.sub(r'(\S{150})\S{100,}(\S{40})', r'\1...\2', text)


def _module(name: str) -> Command:
  module = importlib.import_module(f'impala_jax.commands.{_MODULES.get(name, name)}')
  return cast(Command, module)
