"""A run on three hosts with addresses of their own, cut off and joined again.

The hosts are network namespaces; the roles are the real processes. With a bridge of
the kernel for a wire, and with delay and loss on it.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from impala_jax import config as config_lib
from impala_jax import configs
from impala_jax.distributed.roles import run as run_role
from impala_jax.distributed.security import keys as run_keys
from impala_jax.launching import run_directory
from tests import network_namespaces, transports

pytestmark = pytest.mark.services
_START = 300.0  # Seconds for processes to come up on a busy machine.
_CUT = 30.0  # Seconds that a host is out of reach.


class Run:
  """Roles on hosts, sharing a run directory."""

  def __init__(self, network, run_dir: pathlib.Path, *settings: str):
    config = config_lib.override(
      configs.get('catch'),
      [
        'learner.total_frames=1e9',
        'learner.metrics_interval=0.5',
        'learner.checkpoint_interval=2',
        'actor.num_actors=2',
        *settings,
      ],
    )
    self.run_dir = run_directory.create(config, str(run_dir))
    if config.transport.tls:
      run_keys.ensure(self.run_dir / 'keys')
    self._network = network
    self.processes: dict[str, subprocess.Popen[bytes]] = {}

  def start(self, host: str, role: str, index: int = 0) -> None:
    place = self._network.hosts[host]
    environment = {
      **os.environ,
      'IMPALA_RUN_DIR': str(self.run_dir),
      'IMPALA_INDEX': str(index),
      'IMPALA_PARENT': str(os.getpid()),
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '',
      'PYTHONUNBUFFERED': '1',
    }
    if role == 'learner':
      environment['IMPALA_HOST'] = place.address
    with open(self.run_dir / f'{host}.log', 'ab') as log:
      self.processes[host] = place.popen(
        [sys.executable, '-m', 'impala_jax.distributed.roles.run', role],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
      )

  def close(self) -> None:
    for process in self.processes.values():
      process.kill()
      process.wait()

  def log(self, host: str) -> str:
    return (self.run_dir / f'{host}.log').read_text()

  def status(self) -> dict[str, float]:
    try:
      return json.loads((self.run_dir / 'status.json').read_text())
    except (OSError, ValueError):
      return {}

  @property
  def updates(self) -> int:
    return int(self.status().get('updates', 0))

  def await_updates(self, more: int, seconds: float = _START) -> None:
    """Waits for `more` updates than now; all roles must stay alive."""
    goal = self.updates + more
    deadline = time.monotonic() + seconds
    while self.updates < goal:
      for host, process in self.processes.items():
        assert process.poll() is None, f'{host} ended: {self.log(host)[-2000:]}'
      assert time.monotonic() < deadline, self.logs()
      time.sleep(0.2)

  def silence(self, index: int) -> float:
    """Seconds since the learner last heard from an actor."""
    peers = self.status().get('peers', [])
    return next((p['silent_seconds'] for p in peers if p['index'] == index), 1e9)

  def await_voice(self, index: int) -> None:
    deadline = time.monotonic() + _START
    while self.silence(index) > 5.0:
      assert time.monotonic() < deadline, self.logs()
      time.sleep(0.2)

  def logs(self) -> str:
    return '\n'.join(f'{host}: {self.log(host)[-2000:]}' for host in self.processes)

  def stop(self) -> dict[str, float]:
    """Ends the run by SIGTERM to its learner; returns its last record."""
    self.processes['learner'].send_signal(signal.SIGTERM)
    for host, process in self.processes.items():
      code = run_role.STOPPED if host == 'learner' else 0
      assert process.wait(_START) == code, self.log(host)[-2000:]
    lines = (self.run_dir / 'metrics.jsonl').read_text().splitlines()
    return json.loads(lines[-1])


@contextlib.contextmanager
def running(tmp_path, *settings: str, **wire: float):
  """A run on three hosts that has made some updates, with both actors heard."""
  network_namespaces.require(taps=bool(wire))
  with (
    network_namespaces.Network(['learner', 'actor_a', 'actor_b'], **wire) as network,
    contextlib.closing(Run(network, tmp_path / 'run', *settings)) as run,
  ):
    run.start('learner', 'learner')
    run.start('actor_a', 'actor', 0)
    run.start('actor_b', 'actor', 1)
    run.await_updates(10)
    for index in (0, 1):
      run.await_voice(index)
    yield network, run


@pytest.mark.timeout(900)
@pytest.mark.parametrize('transport', transports.ALL_BETWEEN_PROCESSES)
def test_a_host_is_cut_off_and_comes_back(tmp_path, transport):
  with running(tmp_path, f'transport.kind={transport}') as (network, run):
    cut = time.monotonic()
    network.cut('actor_b')
    # The other one carries on.
    run.await_updates(50)
    time.sleep(max(0.0, cut + _CUT - time.monotonic()))
    run.await_updates(1)
    assert run.silence(1) > _CUT / 2
    network.heal('actor_b')
    run.await_voice(1)

    # Now the learner is away from everybody: what waits in its queue is the last.
    network.cut('learner')
    time.sleep(_CUT / 3)
    before = run.updates
    time.sleep(2 * _CUT / 3)
    assert run.updates == before
    network.heal('learner')
    run.await_updates(50)
    for index in (0, 1):
      run.await_voice(index)
    last = run.stop()
    assert last['unrolls_corrupted'] == last['unrolls_lost'] == 0


@pytest.mark.timeout(900)
@pytest.mark.parametrize('transport', transports.ALL_BETWEEN_PROCESSES)
@pytest.mark.parametrize('tls', [False, True], ids=['plain', 'with keys'])
def test_a_slow_wire_that_loses_frames(tmp_path, transport, tls):
  if (
    tls
    and transport == 'reverb'
    and not (shutil.which('stunnel') or shutil.which('stunnel4'))
  ):
    pytest.skip('the program stunnel is not installed (Debian: stunnel4)')
  settings = [f'transport.kind={transport}', f'transport.tls={tls}']
  with running(tmp_path, *settings, delay=0.02, loss=0.01) as (_, run):
    run.await_updates(20)
    last = run.stop()
    assert last['unrolls_corrupted'] == last['unrolls_lost'] == 0
    assert last['unrolls_duplicated'] == 0
