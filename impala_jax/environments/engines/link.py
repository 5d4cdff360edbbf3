"""Ties engine processes to the pool that uses them: pipes, memory, life and death.

`Link` is the pool's side. Engines are not its children but those of a keeper
(`engine_keeper`), a small process that starts them, kills them with all that they
started, and cleans up after them. What keeper and engines need of this module is in
the standard library, so that they are there in milliseconds.

A pool has one directory `impala_engines_*` in the directory for temporary files:

  3.job         what environment 3 is, pickled
  3.7/          its seventh engine: `output` (stdout and stderr), `report` (the
                exception that ended it), `shared_memory` (names that it made in
                /dev/shm), and `tmp/`, its TMPDIR

Pool and keeper hold a lock on it; a directory without its lock is left from processes
that were all killed at once, and is removed by the next pool.
"""

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import pathlib
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

ANNOUNCEMENT = struct.Struct('=II')  # Environment, generation: one atomic write.
COMMAND = struct.Struct('=I')  # The generation that is to take an action.
CLOSE = 0  # A `COMMAND` that asks for the end: no generation has this number.

_PREFIX = 'impala_engines_'
_SHARED = '/dev/shm/'
MESSAGE = 1 << 18  # Bytes, more than the longest of the control socket.
_SET_DEATH_SIGNAL = 1  # Of prctl.


class Start(NamedTuple):
  """An engine to start."""

  env_id: int
  generation: int  # Number of this engine among those of its environment, from 1.
  seed: int
  name: str
  shared_memory: Sequence[str]  # Prefixes of names in /dev/shm that it makes.


class Ended(NamedTuple):
  """An engine that is no more."""

  env_id: int
  generation: int
  status: int  # Exit code, or minus the signal.
  report: dict[str, Any] | None  # kind, phase, text, episode_seed: see engine_process.
  output: str  # The end of what it wrote to stdout and stderr, in one line.


class Link:
  """Memory shared with the engines, and the way to them and to their keeper.

  Args:
    jobs: what each environment is, as its process is to read it.
    slot_size: bytes of memory of each, a multiple of the page size.
  """

  def __init__(self, jobs: Sequence[bytes], slot_size: int):
    _sweep()
    self._directory = tempfile.mkdtemp(prefix=_PREFIX)
    self._lock = os.open(self._directory, os.O_RDONLY)
    with contextlib.suppress(OSError):  # Where there are no locks, nobody sweeps.
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for i, job in enumerate(jobs):
      pathlib.Path(self._directory, f'{i}.job').write_bytes(job)
    self._memory = os.memfd_create('impala_engines', os.MFD_CLOEXEC)
    os.ftruncate(self._memory, len(jobs) * slot_size)
    self.memory = mmap.mmap(self._memory, len(jobs) * slot_size)
    # Both ends of the pipes are kept for another keeper, should this one die.
    self._commands = [os.pipe() for _ in jobs]
    self._done, self._announce = os.pipe()
    os.set_blocking(self._done, False)
    # An engine that announces itself takes a credit, and wakes this process only where
    # there is none left: one time for all that are waited for.
    self._credits = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    self._alive: set[tuple[int, int]] = set()
    self._closed = False
    self._start_keeper()

  def replace_job(self, env_id: int, job: bytes) -> None:
    """What the next engines of an environment are."""
    pathlib.Path(self._directory, f'{env_id}.job').write_bytes(job)

  def start(self, engines: Sequence[Start]) -> None:
    """Starts engines; that they began their first episodes is announced."""
    self._alive.update((e.env_id, e.generation) for e in engines)
    self._request('start', engines)

  def kill(self, engines: Iterable[tuple[int, int]]) -> None:
    """Kills engines, named by environment and generation, with their children."""
    self._request('kill', list(engines))

  def command(self, env_id: int, generation: int) -> None:
    """Tells an engine that its slot holds an action."""
    os.write(self._commands[env_id][1], COMMAND.pack(generation))

  def poll(
    self, timeout: float, wanted: int
  ) -> tuple[list[tuple[int, int]], list[Ended]]:
    """Waits up to `timeout` seconds for news of `wanted` engines, or of an end.

    Returns:
      Engines, as (environment, generation), whose slots hold a new time step, and
      those that ended. More or fewer than wanted.
    """
    # Without credits every engine wakes. One that announced itself before `_announced`
    # and takes its credit later makes another wake too early, which does no harm.
    with contextlib.suppress(BlockingIOError):
      while True:
        os.eventfd_read(self._credits)
    done = self._announced()
    missing = wanted - len(done)
    if missing > 1:
      os.eventfd_write(self._credits, missing - 1)
    ended: list[Ended] = []
    for fd, _ in self._poller.poll(1000 * timeout if missing > 0 else 0):
      if fd == self._wake:
        os.eventfd_read(fd)
        done += self._announced()
      else:
        ended = self._notices()
    return done, ended

  def close(self, patience: float) -> None:
    """Asks the engines to close; kills those that live after `patience` seconds."""
    if self._closed:
      return
    self._closed = True
    for _, write in self._commands:
      os.write(write, COMMAND.pack(CLOSE))
    with contextlib.suppress(OSError):
      self._control.send(encoded(['close', patience]))
    try:
      self._keeper.wait(patience + 10)
    except subprocess.TimeoutExpired:
      self._keeper.kill()
      self._keeper.wait()
    remove(self._directory)
    self._control.close()
    pipes = [fd for pair in self._commands for fd in pair]
    shared = (self._memory, self._announce, self._credits, self._wake)
    for fd in (*pipes, *shared, self._done, self._lock):
      os.close(fd)

  def _announced(self) -> list[tuple[int, int]]:
    try:
      data = os.read(self._done, 4096 * ANNOUNCEMENT.size)
    except BlockingIOError:
      return []
    return list(ANNOUNCEMENT.iter_unpack(data))

  def _start_keeper(self) -> None:
    self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    self._control.settimeout(10.0)
    reads = [read for read, _ in self._commands]
    shared = [self._memory, self._announce, self._credits, self._wake]
    fds = [theirs.fileno(), self._lock, *shared, *reads]
    environment = dict(
      os.environ,
      # Engines import what this process can.
      PYTHONPATH=os.pathsep.join(p or os.getcwd() for p in sys.path),
      OMP_NUM_THREADS='1',
      OPENBLAS_NUM_THREADS='1',
      MKL_NUM_THREADS='1',
    )
    self._keeper = subprocess.Popen(
      [
        sys.executable,
        '-S',
        '-m',
        'impala_jax.environments.engines.keeper',
        json.dumps([os.getpid(), self._directory, fds]),
      ],
      env=environment,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      pass_fds=fds,
      start_new_session=True,
    )
    theirs.close()
    self._poller = select.poll()
    self._poller.register(self._wake, select.POLLIN)
    self._poller.register(self._control.fileno(), select.POLLIN)

  def _request(self, *message: Any) -> None:
    try:
      self._control.send(encoded(message))
    except TimeoutError:
      self._keeper.kill()  # It hangs. `poll` sees that it is gone.
    except OSError:
      pass  # It is gone.

  def _notices(self) -> list[Ended]:
    try:
      message = self._control.recv(MESSAGE)
    except ConnectionResetError:
      message = b''
    if message:
      ended = Ended(*json.loads(message))
      self._alive.discard((ended.env_id, ended.generation))
      return [ended]
    # Its engines died with it, but not their children.
    kill_users(self._directory)
    self._control.close()
    self._keeper.kill()
    status = self._keeper.wait()
    report = {'kind': 'keeper', 'text': f'the keeper of the engines ended ({status})'}
    lost = [Ended(*engine, -signal.SIGKILL, report, '') for engine in self._alive]
    self._alive.clear()
    self._start_keeper()
    return lost


def encoded(message: Sequence[Any]) -> bytes:
  """A message of the control socket."""
  return json.dumps(message).encode()


def die_with(parent: int) -> None:
  """Has this process killed when its parent, the process `parent`, ends."""
  ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
  if os.getppid() != parent:
    os.kill(os.getpid(), signal.SIGKILL)


def shared_memory(pid: int, prefixes: Sequence[str]) -> list[str]:
  """Names in /dev/shm that process `pid` maps and that begin with a prefix."""
  if not prefixes:
    return []
  try:
    lines = pathlib.Path(f'/proc/{pid}/maps').read_text().splitlines()
  except OSError:
    return []
  starts = tuple(_SHARED + p for p in prefixes)
  paths = {line.split(None, 5)[5] for line in lines if _SHARED in line}
  return sorted(p.removeprefix(_SHARED) for p in paths if p.startswith(starts))


def remove(directory: str) -> None:
  """Removes a pool's or an engine's directory, and the shared memory recorded in it."""
  for record in pathlib.Path(directory).rglob('shared_memory'):
    with contextlib.suppress(OSError):
      unlink(record.read_text().split())
  shutil.rmtree(directory, ignore_errors=True)


def kill_users(directory: str) -> None:
  """Kills what engines started and left: all processes with TMPDIR in `directory`."""
  mark = f'TMPDIR={directory}/'.encode()
  for entry in os.listdir('/proc'):
    if entry.isdigit():
      with contextlib.suppress(OSError):  # It has ended, or is another user's.
        if mark in pathlib.Path('/proc', entry, 'environ').read_bytes():
          os.kill(int(entry), signal.SIGKILL)


def unlink(names: Iterable[str]) -> None:
  """Removes names in /dev/shm, those that are still there."""
  for name in names:
    with contextlib.suppress(OSError):
      os.unlink(_SHARED + name)


def _sweep() -> None:
  """Removes what pools left that were killed together with their keepers."""
  for path in pathlib.Path(tempfile.gettempdir()).glob(_PREFIX + '*'):
    with contextlib.suppress(OSError):
      if time.time() - path.stat().st_mtime < 60:
        continue  # It may not have its lock yet.
      lock = os.open(path, os.O_RDONLY)
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        kill_users(str(path))
        remove(str(path))
      finally:
        os.close(lock)
