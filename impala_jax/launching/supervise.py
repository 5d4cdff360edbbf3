"""Keeps one role's process alive inside a cluster's job, pod or on this machine.

`python -m impala_jax.launching.supervise actor --index=3 -- python -m ... actor`

It ends with the cause when the budget of restarts is spent, and when the run has ended,
which the learner's supervisor or `manage stop` notes in the run directory.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence

from impala_jax.launching import slurm_node, supervision
from impala_jax.runtime import printing, role_environment
from impala_jax.runtime.run_directory import RunDirectory


def parse(arguments: Sequence[str]) -> supervision.Settings:
  """The inverse of `supervision.Settings.arguments`. Exits where there is no such."""
  ours, dashes, command = _split(arguments)
  parser = argparse.ArgumentParser(
    'supervise', usage='IMPALA_RUN_DIR=... supervise ROLE [--field=value] -- COMMAND'
  )
  parser.add_argument('role')
  for field in dataclasses.fields(supervision.Settings):
    if field.name in ('role', 'command'):
      continue
    flag = f'--{field.name}'
    if isinstance(field.default, bool):
      parser.add_argument(flag, action='store_true')
    else:
      parser.add_argument(flag, type=type(field.default), default=field.default)
  found = parser.parse_args(ours)
  if not dashes or not command:
    parser.error('no command')
  return supervision.Settings(**vars(found), command=tuple(command))


def _split(arguments: Sequence[str]) -> tuple[list[str], bool, list[str]]:
  """What is before the first --, whether there is one, and what is behind it."""
  words = list(arguments)
  at = words.index('--') if '--' in words else len(words)
  return words[:at], at < len(words), words[at + 1 :]


def main(arguments: Sequence[str]) -> int:
  printing.replace_unprintable()
  settings = parse(arguments)
  if not os.environ.get('IMPALA_RUN_DIR'):
    print('supervise: IMPALA_RUN_DIR is not set', file=sys.stderr)
    return 2
  if settings.index_from:
    index = settings.index + int(os.environ[settings.index_from])
    settings = dataclasses.replace(settings, index=index)
  if settings.slurm_host:
    host = slurm_node.address(os.environ['SLURMD_NODENAME'])
    os.environ |= role_environment.variables(host=host)
  run = RunDirectory(role_environment.RoleEnvironment.read().run_dir)
  process = supervision.Supervised(settings, run, on_limit=slurm_node.requeue)
  process.install_signals()
  return process.run()


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
