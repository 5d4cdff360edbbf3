"""Starts a run, lets faults befall its processes, and writes down what is seen."""

import argparse
import collections
import contextlib
import os
import pathlib
import random
import subprocess
import sys
import time
from typing import Any, NamedTuple

import psutil

from experiments.soak import processes as soak_processes
from experiments.soak import stranger
from experiments.soak.processes import Replica
from impala_jax.runtime import files

ACTORS = 3
# What befalls a process; kills are twice as likely as each of the others.
_KINDS = ('kill', 'kill', 'orphan', 'freeze', 'terminate')
# What befalls the run; at the learner, whatever that does.
_OF_STRANGERS = ('forge', 'damage', 'launch')
_FREEZE = 20.0  # Seconds.
_PROXY = 'http://127.0.0.1:9'
_START = 240.0  # Seconds for the first update.
_SAMPLE = 5.0  # Seconds between looks at the memory.
_LEAVE = 180.0  # Seconds for an orphan, or for a supervisor that was told to stop.


class Fault(NamedTuple):
  """At `at` seconds after the first update something of `kind` befalls `replica`."""

  at: float
  replica: Replica
  kind: str


def schedule(
  seed: int, seconds: float, interval: float, quiet: float, learners: int, most: int
) -> list[Fault]:
  """Faults at random times with `interval` seconds between them in the mean.

  None in the last `quiet` seconds, and at most `most`; each process is as likely as the
  others, save actor 0.
  """
  rng = random.Random(seed)
  replicas = [
    *(Replica('learner', i) for i in range(learners)),
    *(Replica('actor', i) for i in range(1, ACTORS)),
    Replica('evaluator', 0),
  ]
  faults: list[Fault] = []
  at = 0.0
  while len(faults) < most:
    at += 2.0 + rng.expovariate(1.0 / max(interval - 2.0, 0.1))
    if at > seconds - quiet:
      break
    kind = rng.choice(_KINDS + _OF_STRANGERS)
    of_run = kind in _OF_STRANGERS
    faults.append(Fault(at, replicas[0] if of_run else rng.choice(replicas), kind))
  return faults


class Soak:
  """The run, the faults, and what was seen.

  Args:
    run_dir: of the run, new.
    args: of the command line.
  """

  def __init__(self, run_dir: pathlib.Path, args: argparse.Namespace):
    self.run_dir = run_dir
    self._args = args
    self.replicas = [
      *(Replica('learner', i) for i in range(args.learners)),
      *(Replica('actor', i) for i in range(ACTORS)),
      Replica('evaluator', 0),
    ]
    self.samples: dict[str, list[dict[str, float]]] = collections.defaultdict(list)
    self.ledgers: dict[tuple[int, str], dict[str, Any]] = {}  # By learner process.
    # What each actor process (index, incarnation) ever reported as sent.
    self.sent: dict[tuple[int, int], int] = {}
    self.faults: list[tuple[float, str]] = []
    self.missed = 0  # Faults whose process was away already.
    self.returns: list[float] = []  # Seconds until a killed process was there again.
    self.problems: list[str] = []
    self.stranger = stranger.Stranger(run_dir, args.seed)
    self._frozen: list[tuple[float, psutil.Process]] = []
    # To be started again: replica, its supervisor, what must end first, and by when.
    self._again: list[
      tuple[Replica, soak_processes.Supervisor, list[psutil.Process], float]
    ] = []
    self._awaited: dict[Replica, tuple[float, int]] = {}
    self._started: list[subprocess.Popen[bytes]] = []

  def launch(self) -> None:
    """Submits the run. Raises CalledProcessError where that fails."""
    temporary = self.run_dir / 'tmp'
    temporary.mkdir(parents=True)
    settings = [
      f'actor.num_actors={ACTORS}',
      'actor.envs_per_actor=8',
      'learner.total_frames=1e11',
      'learner.metrics_interval=1',
      'learner.checkpoint_interval=10',
      'evaluator.interval=10',
      f'transport.kind={self._args.transport}',
    ]
    command = [
      sys.executable, '-m', 'impala_jax', 'train', '--config=catch', '--launcher=local',
      f'--launcher_set=local.learners={self._args.learners}',
      '--launcher_set=local.max_restarts=1000000',
      f'--run_dir={self.run_dir}', f'--seed={self._args.seed}',
      *(f'--set={s}' for s in settings),
    ]  # fmt: skip
    # A folder of its own shows which temporary files are left.
    environment = {**os.environ, 'TMPDIR': str(temporary)}
    # As many users' shells have it; nobody listens there.
    environment |= {'http_proxy': _PROXY, 'https_proxy': _PROXY}
    subprocess.run(
      command, check=True, env=environment, stdout=sys.stderr, timeout=_START
    )

  def watch(self) -> float:
    """Faults and samples until the time is over or the run hangs; returns its start."""
    last, start, next_sample = time.time(), 0.0, 0.0
    faults: collections.deque[Fault] = collections.deque()
    while True:
      now = time.time()
      self._take_ledgers()
      last = max(last, self._last_update())
      if not start and self._last_update():
        start = now
        seconds, bound = 60 * self._args.minutes, self._args.bound
        faults.extend(
          schedule(
            self._args.seed,
            seconds,
            self._args.interval,
            min(bound, seconds / 3),
            self._args.learners,
            self._args.most_faults,
          )
        )
      if now - last > (3 * self._args.bound if start else _START):
        self.problems.append(f'hangs: no update for {now - last:.0f} s')
        return start or now
      if start and now > start + 60 * self._args.minutes:
        return start
      while faults and now > start + faults[0].at:
        with contextlib.suppress(psutil.NoSuchProcess):  # It ended in this moment.
          self._strike(faults.popleft())
      self._thaw(now)
      self.problems += self.stranger.look()
      self._start_again(now)
      self._see_returns(now)
      if now > next_sample:
        self._sample()
        next_sample = now + _SAMPLE
      time.sleep(0.5)

  def stop(self) -> float:
    """Ends the run in order; returns the seconds that this took."""
    self._thaw(time.time() + 2 * _FREEZE)
    while self._again:
      self._start_again(time.time())
      time.sleep(0.2)
    begin = time.time()
    done = subprocess.run(
      [sys.executable, '-m', 'impala_jax', 'manage', 'stop', str(self.run_dir)],
      capture_output=True,
      text=True,
      timeout=600,
    )
    if done.returncode or done.stdout.strip() != 'stopped':
      self.problems.append(f'stop said: {(done.stdout + done.stderr).strip()}')
    for process in self._started:
      process.poll()
    self._take_ledgers()
    return time.time() - begin

  def end_all(self) -> None:
    """Whatever has happened: nothing of the run goes on."""
    for process in soak_processes.of_run(self.run_dir):
      with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()

  def _last_update(self) -> float:
    """Time of the newest record, if updates had been made in it; else 0."""
    status = files.read_json(self.run_dir / 'status.json')
    return status['time'] if status.get('frames_per_second', 0) > 0 else 0.0

  def _strike(self, fault: Fault) -> None:
    replica, kind = fault.replica, fault.kind
    if kind in _OF_STRANGERS:
      self._note(fault, kind)
      act = {
        'forge': self.stranger.forge,
        'damage': self.stranger.damage,
        'launch': self.stranger.launch_again,
      }
      act[kind]()
      return
    process = soak_processes.role_process(self.run_dir, replica)
    above = soak_processes.supervisor(self.run_dir, replica)
    if process is None or above is None or replica in self._awaited:
      self.missed += 1
      return
    now = time.time()
    self._note(fault, f'{kind} {replica.name}')
    if kind == 'freeze':
      process.suspend()
      self._frozen.append((now + _FREEZE, process))
      return
    self._awaited[replica] = (now, process.pid)
    if kind == 'kill':
      process.kill()
    else:
      below = above.process.children(recursive=True)
      if kind == 'orphan':
        above.process.kill()
      else:
        above.process.terminate()
      self._again.append((replica, above, [above.process, *below], now + _LEAVE))

  def _note(self, fault: Fault, words: str) -> None:
    self.faults.append((time.time(), words))
    print(f'{fault.at:6.0f} s: {words}', file=sys.stderr, flush=True)

  def _thaw(self, now: float) -> None:
    for until, process in list(self._frozen):
      if now >= until:
        self._frozen.remove((until, process))
        with contextlib.suppress(psutil.NoSuchProcess):
          process.resume()

  def _start_again(self, now: float) -> None:
    for item in list(self._again):
      replica, above, processes, deadline = item
      left = [p for p in processes if not _gone(p)]
      if left and now <= deadline:
        continue
      for process in left:
        self.problems.append(f'{replica.name} did not leave within {_LEAVE:.0f} s')
        with contextlib.suppress(psutil.NoSuchProcess):
          process.kill()
      self._again.remove(item)
      self._started.append(soak_processes.start_again(self.run_dir, replica, above))
    for started in self._started:
      started.poll()  # Else it would stay as a zombie.

  def _see_returns(self, now: float) -> None:
    for replica, (since, pid) in list(self._awaited.items()):
      process = soak_processes.role_process(self.run_dir, replica)
      if process is not None and process.pid != pid:
        self.returns.append(now - since)
        del self._awaited[replica]
      elif now - since > self._args.bound + _LEAVE:
        self.problems.append(f'{replica.name} did not come back')
        del self._awaited[replica]

  def _sample(self) -> None:
    for replica in self.replicas:
      above = soak_processes.supervisor(self.run_dir, replica)
      for name, process in (
        (replica.name, soak_processes.role_process(self.run_dir, replica)),
        ('supervisor', above.process if above else None),
      ):
        taken = soak_processes.sample(process) if process else None
        if taken is not None:
          self.samples[name].append(taken)

  def _take_ledgers(self) -> None:
    for index in range(self._args.learners):
      ledger = files.read_json(self.run_dir / f'unrolls-{index}.json')
      if not ledger:
        continue
      self.ledgers[index, ledger['learner']] = ledger
      for writer in ledger['writers']:
        key = writer['actor'], writer['incarnation']
        self.sent[key] = max(self.sent.get(key, 0), writer['sent'])


def _gone(process: psutil.Process) -> bool:
  try:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
  except psutil.Error:
    return True
