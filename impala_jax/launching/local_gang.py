"""The learners of a run on one machine, kept all together or not at all.

`python -m impala_jax.launching.local_gang --count=2 -- python -m ... learner` starts
them and ends as they end. When one fails, the others are ended, too: what `srun
--kill-on-bad-exit` does for learners on several nodes. The supervisor above starts all
again.
"""

import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Sequence

from absl import app, flags

from impala_jax.launching import run_records, supervised
from impala_jax.runtime import files

_COUNT = flags.DEFINE_integer('count', 1, 'Learner processes.')
_FIRST = flags.DEFINE_integer('first_incarnation', 0, 'At least this.')
_GRACE = flags.DEFINE_float('grace', 30.0, 'Seconds from SIGTERM to SIGKILL.')

# Seconds that learners get to find out by themselves that another has failed.
_NOTICE = 15.0


def run(processes: Sequence[supervised.Supervised]) -> int:
  """Runs processes, each of which is to end once, to the end of all.

  Returns:
    0, or 1 where one failed.
  """
  codes: dict[int, int] = {}

  def keep(index: int) -> None:
    codes[index] = processes[index].run()

  threads = [
    threading.Thread(target=keep, args=(i,), daemon=True) for i in range(len(processes))
  ]
  for thread in threads:
    thread.start()
  parent = os.getppid()
  deadline = None
  while any(thread.is_alive() for thread in threads):
    time.sleep(0.1)
    if os.getppid() != parent:  # Its supervisor has gone: nobody would start it again.
      for process in processes:
        process.stop('the supervisor has gone')
    if deadline is None and any(codes.values()):
      deadline = time.monotonic() + _NOTICE
    if deadline is not None and time.monotonic() > deadline:
      for process in processes:
        process.kill()
  return int(any(codes.values()))


def cause(words: Sequence[str]) -> str:
  """Why the gang ended: those that ended because another did are not the cause."""
  return next((w for w in words if 'GangError' not in w), words[0] if words else '')


def main(argv: list[str]) -> int:
  run_dir = pathlib.Path(os.environ['IMPALA_RUN_DIR'])
  processes = [
      supervised.Supervised(supervised.Settings(
          'learner', index, tuple(argv[1:]), run_dir, _FIRST.value,
          grace=_GRACE.value, once=True,
      ))
      for index in range(_COUNT.value)
  ]  # fmt: skip

  def stop(number: int, frame: object) -> None:
    for process in processes:
      process.stop(signal.Signals(number).name)

  signal.signal(signal.SIGTERM, stop)
  code = run(processes)
  if code:
    records = [
      files.read_json(run_records.record_path(run_dir, 'learner', i))
      for i in range(_COUNT.value)
    ]
    failed = [
      f'learner {r["index"]} {r["words"]}'
      for r in records
      if r.get('state') == 'failed'
    ]
    print(f'CAUSE: {cause(failed)}', flush=True)
  return code


if __name__ == '__main__':
  app.run(lambda argv: sys.exit(main(argv)))
