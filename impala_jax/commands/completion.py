"""Prints a script that completes commands, flags and their values in a shell.

bash: impala completion bash > ~/.local/share/bash-completion/completions/impala
zsh:  impala completion zsh > ~/.zfunc/_impala        # with ~/.zfunc in fpath
fish: impala completion fish > ~/.config/fish/completions/impala.fish
"""

import argparse

from impala_jax import configs
from impala_jax.commands import arguments, main

USAGE = 'SHELL'
_SHELLS = ('bash', 'zsh', 'fish')


def add_flags(parser: arguments.Parser) -> None:
  arguments.one_of(parser, 'shell', 'SHELL', _SHELLS)


def run(args: argparse.Namespace) -> int:
  import shtab  # Nothing else needs it.

  parser = main.whole_parser('impala', list(main.COMMANDS))
  of_kind = {
    'CONFIG': shtab.cmd(f"printf '%s\\n' {' '.join(configs.names())}"),
    'DIR': shtab.DIRECTORY,
    'FILE': shtab.FILE,
  }
  for action in arguments.actions(parser):
    if action.metavar in of_kind:
      action.complete = of_kind[action.metavar]  # type: ignore[attr-defined]
  print(shtab.complete(parser, args.shell))
  return 0
