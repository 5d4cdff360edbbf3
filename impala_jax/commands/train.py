"""Trains an IMPALA agent, with a live view: the main job.

  impala train --game=breakout                      # Atari
  impala train --game=pong,breakout,qbert           # one agent for several games
  impala train --config=catch --transport=local
  impala train --config=my.json --set loss.entropy_cost=0.02

Ctrl-C ends it with a checkpoint and a last evaluation; --resume goes on from there.
"""

import argparse

from impala_jax.commands import arguments, training

USAGE = training.USAGE


def add_flags(parser: arguments.Parser) -> None:
  group = parser.add_argument_group('what to train')
  arguments.flag(
    group,
    'config',
    'Named configuration (`impala list configs`), or a file with one, '
    'such as the config.json of a run.',
    shown='small',
    metavar='CONFIG',
  )
  arguments.flag(
    group,
    'game',
    'Game, or games of a multi-task agent; sets environment.levels.',
    kind=arguments.names,
    shown='those of the configuration',
  )
  training.add_flags(parser)


def run(args: argparse.Namespace) -> int:
  games = ','.join(args.game) if args.game else None
  return training.run(
    args, 'small' if args.config is None else args.config, {'environment.levels': games}
  )
