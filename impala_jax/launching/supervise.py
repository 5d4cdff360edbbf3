"""Keeps one role's process alive inside a cluster's job, pod or on this machine.

`python -m impala_jax.launching.supervise actor --index=3 -- python -m ... actor`

The engine (Slurm, Kubernetes) replaces hosts; this replaces processes, within a
budget of crashes and with growing pauses. It ends with the cause when the budget is
spent, and when the run has ended (`ended.json` in the run directory, which the
learner's supervisor or `launch.manage stop` writes).
"""

import os
import pathlib
import signal
import sys

from absl import app, flags

from impala_jax.launching import slurm_node, supervised

_INDEX = flags.DEFINE_integer('index', 0, 'Index within the role.')
_INDEX_FROM = flags.DEFINE_string('index_from', '', 'Variable to add to --index.')
_FIRST = flags.DEFINE_integer('first_incarnation', 0, 'At least this.')
_MAX_RESTARTS = flags.DEFINE_integer('max_restarts', 5, 'Within --window.')
_WINDOW = flags.DEFINE_float('window', 600.0, 'Seconds in which deaths count.')
_GRACE = flags.DEFINE_float('grace', 30.0, 'Seconds from SIGTERM to SIGKILL.')
_LINGER = flags.DEFINE_float(
  'linger', 0.0, 'Seconds that the process may go on after the run has ended.'
)
_PATIENCE = flags.DEFINE_float(
  'patience', 43_200.0, 'Seconds that a role waits for a learner.'
)
_ESSENTIAL = flags.DEFINE_bool('essential', False, 'The run ends with this role.')
_ONCE = flags.DEFINE_bool(
  'once', False, 'End as the process ends: one of a gang, which is kept as a whole.'
)
_STOP_SIGNAL = flags.DEFINE_enum(
  'stop_signal', 'SIGTERM', ('SIGTERM', 'SIGUSR1'),
  'What ends the process in order; srun answers SIGTERM with SIGKILL for its tasks.',
)  # fmt: skip
_SLURM_HOST = flags.DEFINE_bool('slurm_host', False, 'IMPALA_HOST as Slurm knows it.')


def main(argv: list[str]) -> int:
  run_dir = os.environ.get('IMPALA_RUN_DIR', '')
  if len(argv) < 3 or not run_dir:
    print('usage: IMPALA_RUN_DIR=... supervise ROLE -- COMMAND', file=sys.stderr)
    return 2
  index = _INDEX.value
  if _INDEX_FROM.value:
    index += int(os.environ[_INDEX_FROM.value])
  if _SLURM_HOST.value:
    os.environ['IMPALA_HOST'] = slurm_node.address(os.environ['SLURMD_NODENAME'])
  process = supervised.Supervised(
      supervised.Settings(
          argv[1], index, tuple(argv[2:]), pathlib.Path(run_dir), _FIRST.value,
          _MAX_RESTARTS.value, _WINDOW.value, _GRACE.value, _LINGER.value,
          _PATIENCE.value, _ESSENTIAL.value, _ONCE.value,
          signal.Signals[_STOP_SIGNAL.value],
      ),
      on_limit=slurm_node.requeue,
  )  # fmt: skip
  process.install_signals()
  return process.run()


if __name__ == '__main__':
  app.run(lambda argv: sys.exit(main(argv)))
