"""Draws the learning curves of several runs in one picture.

  impala compare --out=curves.png --title=Breakout runs/... runs/...

It prints a line for each run: frames, minutes, agent steps a second, last returns.
"""

import argparse
import pathlib
import sys

from impala_jax.commands import arguments
from impala_jax.reporting import compare

USAGE = '--out=FILE DIR [DIR ...] [flags]'


def add_flags(parser: arguments.Parser) -> None:
  parser.add_argument(
    'runs', nargs='+', metavar='DIR', help='directories of runs', type=pathlib.Path
  )
  arguments.flag(
    parser, 'out', 'The picture.', '', shown='none, it must be given', metavar='FILE'
  )
  arguments.flag(parser, 'title', 'Above the curves.', '', shown='none')


def run(args: argparse.Namespace) -> int:
  if not args.out:
    raise arguments.Mistake('--out is missing: the file of the picture')
  try:
    for line in compare.draw(args.runs, pathlib.Path(args.out), args.title):
      print(line)
  except ValueError as e:
    print(f'impala_jax: {e}', file=sys.stderr)
    return 1
  return 0
