"""The learners of a run on one machine, kept all together or not at all.

`python -m impala_jax.launching.local_gang --count=2 learner --once -- python …`
starts them and ends as they end. When one fails, the others are ended, too: what `srun
--kill-on-bad-exit` does for learners on several nodes. The supervisor above starts all
again.
"""

import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

from impala_jax.distributed.roles import run as roles
from impala_jax.launching import supervise, supervision
from impala_jax.runtime import role_environment
from impala_jax.runtime.run_directory import RunDirectory

# Seconds that learners get to find out by themselves that another has failed.
_NOTICE = 15.0


def run_all(processes: Sequence[supervision.Supervised]) -> int:
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
  if roles.MISTAKE in codes.values():
    return roles.MISTAKE
  return int(any(codes.values()))


def cause(words: Sequence[str]) -> str:
  """Why the gang ended: those that ended because another did are not the cause."""
  return next((w for w in words if 'GangError' not in w), words[0] if words else '')


def main(arguments: Sequence[str]) -> int:
  """Arguments: --count=N, then as for `launching.supervise`."""
  count, *rest = arguments
  learners = int(count.removeprefix('--count='))
  run = RunDirectory(role_environment.RoleEnvironment.read().run_dir)
  settings = supervise.parse(rest)
  gang = [
    supervision.Supervised(dataclasses.replace(settings, index=index), run)
    for index in range(learners)
  ]

  def stop(number: int, frame: object) -> None:
    for process in gang:
      process.stop(signal.Signals(number).name)

  signal.signal(signal.SIGTERM, stop)
  code = run_all(gang)
  if code:
    failed = [
      f'learner {p.settings.index} {p.words}' for p in gang if p.state == 'failed'
    ]
    print(f'CAUSE: {cause(failed)}', flush=True)
  return code


def command(python: str, count: int, settings: supervision.Settings) -> list[str]:
  """The command that keeps `count` learners, each supervised by these settings."""
  module = 'impala_jax.launching.local_gang'
  return [python, '-m', module, f'--count={count}', *settings.arguments()]


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
