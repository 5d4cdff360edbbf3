"""Entry point of a role's process: `python -m impala_jax.distributed.roles.run actor`.

The rest comes by environment variables, so that every launcher starts the same command:
see `runtime.role_environment`.

Exits with 0 at the end of the run, with 1 and a line `CAUSE: ...` where it fails, with
78 (`MISTAKE`) and such a line where the same would come of another try, with 2 for a
wrong command, and with 143 (`STOPPED`) where it was ended in order by SIGTERM: whoever
did not ask for that starts it again.
"""

import json
import logging
import os
import signal
import sys
import threading
import warnings

from impala_jax.runtime import files, lease, role_environment, stage
from impala_jax.runtime.run_directory import RunDirectory

STOPPED = 128 + signal.SIGTERM
MISTAKE = os.EX_CONFIG
ROLES = ('learner', 'actor', 'inference', 'evaluator', 'all')


def main(argv: list[str]) -> int:
  if len(argv) != 2 or argv[1] not in ROLES:
    print(f'usage: roles.run {"|".join(ROLES)}', file=sys.stderr)
    return 2
  role = argv[1]
  here = role_environment.RoleEnvironment.read()
  stop = threading.Event()
  signal.signal(signal.SIGTERM, lambda *_: stop.set())
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's business.
  logging.basicConfig(
    level=logging.INFO,
    format=f'%(asctime)s {role} {here.index} %(levelname)s %(message)s',
    stream=sys.stdout,
    force=True,
  )
  # What JAX tells of backends that are not here, and of forks, although what is forked
  # (a film's encoder) is executed at once, frightens for nothing.
  logging.getLogger('jax').setLevel(logging.WARNING)
  warnings.filterwarnings('ignore', r'os\.fork', RuntimeWarning)

  def should_stop() -> bool:
    return stop.is_set() or here.parent not in (0, os.getppid())

  stage.enter('importing')
  # Late, so that signals are handled while JAX loads.
  from impala_jax.runtime import allocator, compile_cache

  allocator.keep_memory()
  compile_cache.enable()
  from impala_jax import components
  from impala_jax import config as config_lib
  from impala_jax.distributed.roles import actor as actor_role
  from impala_jax.distributed.roles import all_in_one
  from impala_jax.distributed.roles import evaluator as evaluator_role
  from impala_jax.distributed.roles import inference as inference_role
  from impala_jax.distributed.roles import learner as learner_role
  from impala_jax.environments import base
  from impala_jax.learning import loop as loop_lib

  try:
    saved = json.loads(RunDirectory(here.run_dir).config.read_text())
    parts = components.build(config_lib.from_dict(saved['config']))
    whole = False
    if role == 'learner':
      whole = learner_role.run(parts, here, should_stop)
    elif role == 'actor':
      actor_role.run(parts, here, should_stop)
    elif role == 'inference':
      inference_role.run(parts, here, should_stop)
    elif role == 'evaluator':
      evaluator_role.run(parts, here, should_stop)
    else:
      loop = all_in_one.run(
        parts,
        here.run_dir,
        should_stop,
        check=lambda: lease.check(
          RunDirectory(here.run_dir), 'all', 0, here.incarnation
        ),
      )
      whole = loop.frames >= parts.config.learner.total_frames
  except Exception as e:
    logging.exception('%s %d failed', role, here.index)
    words = files.explain(e) if isinstance(e, OSError) else str(e)
    print(f'CAUSE: {type(e).__name__}: {words}', flush=True)
    mistakes = config_lib.ConfigError | base.EngineMistake | loop_lib.NotFinite
    # Where the run is one process, what an actor raised is the cause.
    mistaken = isinstance(e, mistakes) or isinstance(e.__cause__, mistakes)
    return MISTAKE if mistaken else 1
  return STOPPED if stop.is_set() and not whole else 0


if __name__ == '__main__':
  code = main(sys.argv)
  sys.stdout.flush()
  # Native threads of the queue's server and of XLA may outlive an orderly
  # interpreter shutdown; all files are closed by now.
  os._exit(code)
