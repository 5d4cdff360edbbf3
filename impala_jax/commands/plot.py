"""Draws the learning curves of a run, at any time: all levels, and each by itself.

impala plot runs/...
"""

import argparse
import pathlib
import sys

from impala_jax.commands import arguments
from impala_jax.reporting import plots

USAGE = 'DIR'


def add_flags(parser: arguments.Parser) -> None:
  parser.add_argument(
    'run_dir', metavar='DIR', help='directory of the run', type=pathlib.Path
  )


def run(args: argparse.Namespace) -> int:
  path = plots.learning_curve(args.run_dir)
  if path is None:
    print(
      f'impala_jax: {args.run_dir}: no finished episode in metrics.jsonl yet',
      file=sys.stderr,
    )
    return 1
  print(path)
  by_level = plots.level_curves(args.run_dir)
  if by_level is not None:
    print(by_level)
  return 0
