"""Trains one agent on many levels, by default on the 30 levels of DMLab-30.

impala dmlab30 --num_actors=4                     # needs DeepMind Lab
impala dmlab30 --num_actors=1000                  # the site's launcher, or
impala dmlab30 --num_actors=1000 --launcher=slurm --run_dir=DIR
impala dmlab30 --suite=doom                       # ViZDoom, which pip installs
"""

import argparse

from impala_jax.commands import arguments, training

# The named configuration of each suite.
_CONFIGS = {'dmlab': 'dmlab30', 'doom': 'doom'}

USAGE = training.USAGE


def add_flags(parser: arguments.Parser) -> None:
  group = parser.add_argument_group('what to train')
  of_config = 'that of the configuration'
  arguments.flag(
    group, 'suite', 'Family of levels.', choices=sorted(_CONFIGS), shown='dmlab'
  )
  arguments.flag(
    group,
    'config',
    'Named configuration (`impala list configs`), or a file with one.',
    shown='dmlab30 or doom, by --suite',
    metavar='CONFIG',
  )
  arguments.flag(
    group,
    'levels',
    'Levels, or dmlab30 for all.',
    kind=arguments.names,
    shown='those of the configuration',
  )
  arguments.switch(
    group,
    'skip_unavailable_levels',
    'Leave out levels that lack their data.',
    None,
    shown=of_config,
  )
  arguments.flag(
    group, 'network', 'Torso: shallow, deep, nature, mlp.', shown=of_config
  )
  arguments.flag(
    group,
    'dataset_path',
    'Folder of the pictures that two psychlab levels need.',
    shown=of_config,
    metavar='DIR',
  )
  arguments.flag(
    group, 'level_cache', 'Folder of compiled maps.', shown=of_config, metavar='DIR'
  )
  training.add_flags(parser)


def run(args: argparse.Namespace) -> int:
  return training.run(
    args,
    _CONFIGS[args.suite or 'dmlab'] if args.config is None else args.config,
    {
      'environment.suite': args.suite,
      'environment.levels': ','.join(args.levels) if args.levels else None,
      'dmlab.skip_unavailable_levels': args.skip_unavailable_levels,
      'dmlab.dataset_path': args.dataset_path,
      'dmlab.level_cache': args.level_cache,
      'network.torso': args.network,
    },
  )
