"""A run directory has one owner: what a launch asks before it begins.

`runtime.lease` has the files. Here is who is asked whether the owner lives: the kernel,
where its process would be seen from here; the engine that it was submitted to; else its
beats are watched.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from impala_jax.launching import backends
from impala_jax.launching.backends import backend, local
from impala_jax.runtime import lease
from impala_jax.runtime.run_directory import RunDirectory

PYTHON = 'Python'  # The launcher of a run by `impala_jax.train`.
_ENGINES = ('slurm', 'kubernetes')  # Of which one must be asked.


def last_owner(run: RunDirectory, manage: str = 'impala manage') -> lease.Owner | None:
  """The one before, of which nothing runs any more; None where there was none.

  Args:
    run: its directory.
    manage: how the user calls the command that stops runs.

  Raises:
    BackendError: the run goes on; or nobody can tell whether it does.
  """
  owner = lease.newest(run)
  if owner is not None and lives(run, owner, manage):
    raise backend.BackendError(describe(run, owner, manage))
  return owner


def claim(
  run: RunDirectory,
  launcher: str,
  before: lease.Owner | None,
  manage: str = 'impala manage',
) -> int:
  """Makes this launch the owner of a run directory.

  Args:
    run: its directory.
    launcher: where it will run, for people.
    before: what `last_owner` gave.
    manage: see there.

  Returns:
    The number of the launch, above all before. `lease.release` ends it.

  Raises:
    BackendError: another was faster.
  """
  launch = max(run.launches(), before.launch + 1 if before else 0)
  if not lease.make(run, launch, launcher):
    raise backend.BackendError(describe(run, lease.read(run, launch), manage))
  return launch


@contextlib.contextmanager
def held(run: RunDirectory) -> Iterator[Callable[[], None]]:
  """Owns a run directory for this process while the context lasts.

  Yields:
    What raises `lease.LeaseError` once another launch has it.

  Raises:
    BackendError: see `last_owner`.
  """
  launch = claim(run, PYTHON, last_owner(run))
  incarnation = lease.first_incarnation(launch)
  try:
    with lease.Heart(run, launch):
      yield lambda: lease.check(run, PYTHON, 0, incarnation)
  finally:
    lease.release(run, launch)


def lives(run: RunDirectory, owner: lease.Owner, manage: str = 'impala manage') -> bool:
  """Whether something of an owner's launch still runs; bounded in time.

  Raises:
    BackendError: its engine cannot be asked, and its end was not noted.
  """
  if owner.released or lease.is_copied(run, owner):
    return False
  launch = _launch(run, owner)
  if launch is not None and launch.launcher in _ENGINES:
    try:
      return _any_left(launch)
    except backend.BackendError as e:
      if lease.beats(run, owner):
        return True
      if run.how_ended():
        return False
      raise backend.BackendError(
        f'{run.path} was submitted to {launch.launcher}, which cannot be asked whether '
        f'it still runs ({e}): end it with {manage} stop {run.path} where that can be '
        f'asked, or delete {run.owner(0).parent} if you know that it does not run'
      ) from e
  if owner.here:
    process = local.process_of({'pid': owner.pid, 'created': owner.created})
    return process is not None or (launch is not None and _any_left(launch))
  print(
    f'{run.path} was last run on {owner.host or "another host"}: watching for a sign '
    'of life',
    file=sys.stderr,
  )
  return lease.beats(run, owner)


def check_in_reach(launch: backend.Launch) -> None:
  """Raises BackendError where the processes of a launch are another machine's."""
  owner = lease.newest(launch.run)
  if owner is None or owner.here or owner.released or launch.launcher in _ENGINES:
    return
  if lease.beats(launch.run, owner):
    raise backend.BackendError(f'{launch.run.path} runs on {owner.host}: stop it there')


def describe(run: RunDirectory, owner: lease.Owner, manage: str) -> str:
  """That it runs: where, since when, and how to stop it."""
  since = time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(owner.since))
  where = f'process {owner.pid} on {owner.host}'
  if owner.launcher in _ENGINES:
    where = f'last seen as {where}'
  stop = f'stop it with: {manage} stop {run.path}'
  if owner.launcher == PYTHON:
    stop = 'it ends with that process'
  elif owner.launcher not in _ENGINES and not owner.here:
    stop += f' (on {owner.host})'
  by = owner.launcher or 'an unknown launcher'
  return f'already runs: {run.path}, by {by} since {since}, {where}; {stop}'


def _launch(run: RunDirectory, owner: lease.Owner) -> backend.Launch | None:
  """What an owner submitted, if it has come so far."""
  try:
    launch = backend.read_launch(run.path)
  except backend.BackendError:
    return None
  same = lease.launch_of(launch.program.first_incarnation) == owner.launch
  return launch if same else None


def _any_left(launch: backend.Launch) -> bool:
  tasks = backends.of_launch(launch).status(launch)
  return any(task.state in ('pending', 'running') for task in tasks)
