"""The keeper of a pool's engines: `process_pool` and `engine_link` say what for.

It is their parent, so that somebody reaps and cleans up whatever happens to the pool's
process: a thread of the engine's own could not, for an engine may never let go of
Python's lock. When the pool's process ends, however it does, the keeper ends all.
"""

import contextlib
import ctypes
import json
import os
import pathlib
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence

from impala_jax.environments.engines import link as engine_link

_SET_SUBREAPER = 36  # Of prctl.
_ERRORS = ('Check failed', 'PANIC', 'FATAL', 'Error', 'ERROR')  # In what engines print.


class _Keeper:
  """Starts engines and ends them; lives no longer than the pool's process."""

  def __init__(self, parent: int, directory: str, fds: Sequence[int]):
    self._parent = parent
    self._directory = directory
    for fd in fds:
      os.set_inheritable(fd, False)
    self._control = socket.socket(fileno=fds[0])
    self._shared_fds, self._commands = fds[2:6], fds[6:]
    self._warnings = os.dup(2)  # Engines have a stderr of their own.
    os.set_inheritable(self._warnings, True)
    self._engines: dict[int, engine_link.Start] = {}  # By process.
    self._shared: dict[int, list[str]] = {}  # Of engines about to be killed.
    for fd in self._shared_fds:
      os.set_inheritable(fd, True)
    self._woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    # Engines' orphans become children of this process, which can then reap them.
    ctypes.CDLL(None).prctl(_SET_SUBREAPER, 1)

  def run(self) -> None:
    try:
      self._end(self._serve())
    finally:
      engine_link.remove(self._directory)

  def _serve(self) -> float:
    """Returns the seconds that engines have to close themselves."""
    try:
      parent = os.pidfd_open(self._parent)
    except ProcessLookupError:
      return 0.0
    poller = select.poll()
    for fd in (parent, self._control.fileno(), self._woken):
      poller.register(fd, select.POLLIN)
    while True:
      for fd, _ in poller.poll():
        if fd == self._woken:
          os.read(fd, 4096)
          continue
        message = b'' if fd == parent else self._receive()
        if not message:
          return 0.0
        request, argument = json.loads(message)
        if request == 'close':
          return argument
        if request == 'start':
          for engine in argument:
            self._start(engine_link.Start(*engine))
        else:
          for pid, engine in self._engines.items():
            if list(engine[:2]) in argument:
              self._kill(pid)
      self._reap()

  def _receive(self) -> bytes:
    try:
      return self._control.recv(engine_link.MESSAGE)
    except ConnectionResetError:
      return b''

  def _start(self, engine: engine_link.Start) -> None:
    directory = f'{self._directory}/{engine.env_id}.{engine.generation}'
    command = self._commands[engine.env_id]
    fds = [*self._shared_fds, command, self._warnings]
    module = 'impala_jax.environments.engines.process'
    arguments = json.dumps([os.getpid(), directory, fds, *engine])
    os.set_inheritable(command, True)
    try:
      os.makedirs(f'{directory}/tmp')
      pid = os.posix_spawn(
        sys.executable,
        [sys.executable, '-m', module, arguments],
        {**os.environ, 'TMPDIR': f'{directory}/tmp'},
        file_actions=[
          (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
          (
            os.POSIX_SPAWN_OPEN,
            1,
            f'{directory}/output',
            os.O_WRONLY | os.O_CREAT | os.O_APPEND,
            0o600,
          ),
          (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        setsigdef=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE],
      )
      self._engines[pid] = engine
    except OSError as e:
      report = {'kind': 'exception', 'phase': 'start', 'text': f'no process: {e}'}
      self._tell(engine_link.Ended(*engine[:2], 1, report, ''))
    finally:
      os.set_inheritable(command, False)

  def _kill(self, pid: int) -> None:
    self._shared[pid] = engine_link.shared_memory(pid, self._engines[pid].shared_memory)
    _kill_group(pid)

  def _reap(self) -> None:
    while True:
      try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
      except ChildProcessError:
        return
      if found is None:
        return
      pid = found.si_pid
      engine = self._engines.pop(pid, None)
      if engine is not None:
        _kill_group(pid)  # Before it is reaped: now the number cannot be another's.
      status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
      if engine is not None:
        self._clean(engine, pid, status)

  def _clean(self, engine: engine_link.Start, pid: int, status: int) -> None:
    directory = f'{self._directory}/{engine.env_id}.{engine.generation}'
    try:
      report = json.loads(pathlib.Path(directory, 'report').read_text())
    except (OSError, ValueError):
      report = None
    engine_link.kill_users(directory)  # Those that left the engine's group.
    engine_link.unlink(self._shared.pop(pid, ()))
    output = _last_words(pathlib.Path(directory, 'output'))
    engine_link.remove(directory)
    self._tell(engine_link.Ended(*engine[:2], status, report, output))

  def _tell(self, ended: engine_link.Ended) -> None:
    with contextlib.suppress(OSError):  # It is gone: the next thing seen.
      self._control.send(engine_link.encoded(ended))

  def _end(self, patience: float) -> None:
    deadline = time.monotonic() + patience
    self._reap()
    while self._engines and time.monotonic() < deadline:
      select.select([self._woken], [], [], 0.05)
      self._reap()
    for pid in self._engines:
      self._kill(pid)
    # Whatever is left: orphans come here by and by.
    deadline = time.monotonic() + 5
    while (children := _children()) and time.monotonic() < deadline:
      for pid in children:
        with contextlib.suppress(ProcessLookupError):
          os.kill(pid, signal.SIGKILL)
      time.sleep(0.005)
      self._reap()


def _kill_group(pid: int) -> None:
  with contextlib.suppress(ProcessLookupError):
    os.killpg(pid, signal.SIGKILL)


def _children() -> list[int]:
  """Of this process, zombies too."""
  found = []
  for entry in os.listdir('/proc'):
    if entry.isdigit():
      with contextlib.suppress(OSError):
        stat = pathlib.Path('/proc', entry, 'stat').read_text()
        if int(stat.rpartition(')')[2].split()[1]) == os.getpid():
          found.append(int(entry))
  return found


def _last_words(path: pathlib.Path) -> str:
  """The line that names an error, if one does, and the last two lines."""
  try:
    with path.open('rb') as f:
      f.seek(max(0, path.stat().st_size - 4096))
      lines = f.read().decode(errors='replace').splitlines()
  except OSError:
    return ''
  lines = [x.strip() for x in lines if x.strip()]
  # Engines print a trace after it.
  named = [x[:300] for x in lines if any(w in x for w in _ERRORS)][-1:]
  return ' | '.join(dict.fromkeys([*named, *lines[-2:]]))[:600]


if __name__ == '__main__':
  # It ends when its parent has ended: the same signals reach that one, too.
  for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(_number, signal.SIG_IGN)
  _Keeper(*json.loads(sys.argv[1])).run()
