"""Actors and the evaluator through restarts, moves and the loss of their learner.

First with the real servers, the learner being a process that is killed; then the link
alone, with learners that do as they are told.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from impala_jax.distributed.control import learner_link, locator, protocol
from impala_jax.distributed.transport import protocol as transport
from impala_jax.environments import vector
from impala_jax.runtime import role_environment
from tests import actors, counting, transports
from tests.acting import actor_test

_LONG = 120.0  # Seconds that a busy machine may take.
_ENVS = 3
_BATCH, _CAPACITY = 4, 8

# Serves versions from argv[2] on, one more with each batch; says what it read. Reads
# argv[3] batches and then nothing more, until its input ends.
_LEARNER = """
import json, os, pathlib, sys, time
import numpy as np
from impala_jax.distributed.control import board, endpoints
from impala_jax.runtime import files, role_environment
from tests import transports
from tests.distributed.control import learner_link_test as test

layout = test.layout()
run_dir = pathlib.Path(sys.argv[1])
version, batches = int(sys.argv[2]), int(sys.argv[3])
served = board.Board()

def publish():
  value = np.full(1, version, np.float32)
  served.publish(version, lambda: {'version': value})

publish()
here = role_environment.RoleEnvironment.read()
kind = transports.BETWEEN_PROCESSES
with endpoints.serve(kind, layout, 4, 8, served, here) as (reader, addresses):
  files.write_json(run_dir / 'address.json', addresses)
  while batches:
    try:
      batch = reader.read(1.0)
    except TimeoutError:
      pass
    else:
      batches -= 1
      version += 1
      publish()
      headers = layout.header(batch.rows)
      rows = [[int(h['sequence']), int(h['version'])] for h in headers]
      print(json.dumps({'rows': rows}), flush=True)
      batch.release()
    stats = reader.stats()
    counts = [stats.queued, stats.lost, stats.duplicated, stats.corrupted]
    print(json.dumps({'counts': counts}), flush=True)
  sys.stdin.read()
"""


def layout():
  environment = counting.CountingEnvironment(num_actions=actor_test._ACTIONS)
  spec = vector.SequentialVector([lambda: environment]).spec
  return actor_test._layout(spec, logits=False)


class Learner:
  """A process of `_LEARNER`, and what it has said."""

  def __init__(self, run_dir, version, batches, ports):
    environment = {**os.environ, 'XLA_FLAGS': '', 'TF_CPP_MIN_LOG_LEVEL': '3', **ports}
    self._log = open(run_dir / f'learner-{version}.log', 'wb')  # noqa: SIM115
    self.process = subprocess.Popen(
      [sys.executable, '-c', _LEARNER, str(run_dir), str(version), str(batches)],
      env=environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._log,
      text=True,
    )
    self.rows = []  # (sequence, version)
    self.counts = [0, 0, 0, 0]  # Of `_LEARNER`.
    self._thread = threading.Thread(target=self._listen, daemon=True)
    self._thread.start()

  def _listen(self):
    for line in self.process.stdout:
      said = json.loads(line)
      self.rows += [tuple(r) for r in said.get('rows', [])]
      self.counts = said.get('counts', self.counts)

  def kill(self):
    self.process.send_signal(signal.SIGKILL)
    self.process.wait(_LONG)
    self._thread.join(_LONG)

  def close(self):
    self.kill()
    self.process.stdin.close()
    self._log.close()


class Recorder:
  """Keeps a copy of each row that the link confirmed."""

  def __init__(self, link):
    self._link = link
    self.rows = []

  def write(self, row, timeout):
    self._link.write(row, timeout)
    self.rows.append(row.copy())


class Client:
  """An actor with counting environments in a thread of this process."""

  def __init__(self, run_dir, patience=_LONG):
    self.made = []

    def make(env_id):
      self.made.append(
        counting.CountingEnvironment(env_id, (3, 5), num_actions=actor_test._ACTIONS)
      )
      return self.made[-1]

    self.link = learner_link.open_link(
      locator.Locator(run_dir, 0, transports.BETWEEN_PROCESSES, layout()),
      lambda: False,
      writes=True,
    )
    self.writer = Recorder(self.link)
    environment = vector.SequentialVector([lambda i=i: make(i) for i in range(_ENVS)])
    self.actor = actors.make(
      actor_test._counting_agent(),
      environment,
      layout(),
      self.writer,
      self.link,
      unroll_length=actor_test._T,
      patience=patience,
    )
    self.error = None

  def start(self, unrolls):
    def run():
      try:
        self.actor.run(max_unrolls=unrolls)
      except Exception as e:
        self.error = e

    self.thread = threading.Thread(target=run, daemon=True)
    self.thread.start()

  def check_environments(self):
    """None was made or reset anew, and no time step is missing between unrolls."""
    assert [e._env_id for e in self.made] == list(range(_ENVS))
    taken = sum(len(e.actions) for e in self.made)
    assert self.actor.agent_steps - _ENVS <= taken <= self.actor.agent_steps
    form = layout()
    last = {}
    for row in self.writer.rows:
      env_id = int(form.header(row)['env_id'])
      seen = form.views(row).timestep.observation
      assert tuple(seen[0]) == last.get(env_id, (env_id, 0, 0))
      for (_, episode, step), after in itertools.pairwise(seen.tolist()):
        over = step == self.made[env_id].length(episode)
        assert after[1:] == ([episode + 1, 0] if over else [episode, step + 1])
      last[env_id] = tuple(seen[-1])
    assert sorted(last) == list(range(_ENVS))


@pytest.fixture
def place(tmp_path):
  with contextlib.ExitStack() as stack:

    def start(version, batches, **ports):
      learner = Learner(tmp_path, version, batches, ports)
      stack.callback(learner.close)
      return learner

    yield tmp_path, start, stack


def wait(condition, what):
  deadline = time.monotonic() + _LONG
  while not condition():
    assert time.monotonic() < deadline, what
    time.sleep(0.05)


@pytest.mark.parametrize('same_port', [False, True], ids=['moved', 'same port'])
def test_an_actor_outlives_its_learner(place, same_port):
  run_dir, start, stack = place
  first = start(version=100, batches=3)
  client = Client(run_dir)
  stack.callback(client.link.close)
  client.start(unrolls=60)
  # It has read 3 batches and will take no more: its queue is full, the actor waits.
  wait(lambda: len(first.rows) == 12, 'three batches')
  settled = time.monotonic() + 3.0
  sent = 0
  while time.monotonic() < settled or sent < 12 + _CAPACITY:
    if sent != client.actor.unrolls_sent:
      sent, settled = client.actor.unrolls_sent, time.monotonic() + 3.0
    assert client.error is None
    time.sleep(0.05)
  # Even blocked, it finds out.
  first.kill()
  ports = {}
  if same_port:
    address = json.loads((run_dir / 'address.json').read_text())
    names = {'IMPALA_CONTROL_PORT': 'control', 'IMPALA_QUEUE_PORT': 'transport'}
    ports = {k: address[v].rpartition(':')[2] for k, v in names.items()}
  second = start(version=40, batches=1000, **ports)
  client.thread.join(_LONG)
  assert not client.thread.is_alive()
  assert client.error is None
  assert client.actor.unrolls_sent == 60
  client.check_environments()

  # Every unroll: read by the first, in its queue when it died, read or with the second.
  assert [s for s, _ in first.rows] == list(range(12))
  wait(lambda: len(second.rows) + second.counts[0] == 60 - sent, 'all unrolls')
  in_flight = sent - 12
  assert _CAPACITY <= in_flight <= _CAPACITY + 4
  got = [s for s, _ in second.rows]
  assert got == list(range(sent, sent + len(got)))
  assert second.counts[1:] == [0, 0, 0]
  # The parameters of the second, although their version is lower.
  versions = [v for _, v in second.rows]
  assert versions[0] >= 100
  new = list(itertools.dropwhile(lambda v: v >= 100, versions))
  assert len(new) > len(versions) // 2
  assert all(40 <= v < 100 for v in new)
  assert client.actor.version < 100
  # One that is back at once, where the old one was, may go unnoticed.
  assert client.link.reconnections >= 1 or same_port


def test_a_learner_that_stays_away_ends_the_actor_with_a_cause(place):
  run_dir, start, stack = place
  learner = start(version=0, batches=1000)
  client = Client(run_dir, patience=2.0)
  stack.callback(client.link.close)
  client.start(unrolls=10**9)
  wait(lambda: client.actor.unrolls_sent > 8, 'some unrolls')
  learner.kill()
  client.thread.join(_LONG)
  assert isinstance(client.error, transport.TransportError)
  assert 'actor 0 has been without its learner for 2 s' in str(client.error)
  client.check_environments()


class FakeLearner:
  """Both connections in one object."""

  def __init__(self, name):
    self.name = name
    self.learner = ''
    self.gone = False
    self.stopping = False
    self.version = 7
    self.rows = 0
    self.opened = self.closed = 0

  def _check(self):
    if self.gone:
      raise transport.TransportError(f'nobody at {self.name}')

  def fetch(self, have_version):
    self._check()
    if self.learner == self.name and self.version <= have_version:
      return None
    self.learner = self.name
    return self.version, {}

  def report(self, report):
    self._check()
    return not self.stopping

  def write(self, row, timeout):
    self._check()
    self.rows += 1

  def close(self):
    self.closed += 1


class FakeWay:
  def __init__(self):
    self.places = {'a': FakeLearner('a'), 'b': FakeLearner('b')}
    self.where = 'a'
    self.over = False

  def address(self):
    return self.where and {'control': self.where, 'transport': self.where}

  def ended(self):
    return self.over

  def control(self, address):
    self.places[address].opened += 1
    return self.places[address]

  def writer(self, address):
    return contextlib.closing(self.control(address))


@pytest.fixture
def fake(monkeypatch):
  monkeypatch.setattr(learner_link, '_LOOK', 0.0)
  monkeypatch.setattr(learner_link, '_FIRST_PAUSE', 0.0)
  monkeypatch.setattr(learner_link, '_LONGEST_PAUSE', 0.0)
  way = FakeWay()
  return way, learner_link.LearnerLink(way, way.address(), supervised=True)


_REPORT = protocol.Report('actor', 0, 0, {})
_ROW = np.zeros(3, np.uint8)


def test_a_moved_learner_is_followed_though_the_old_one_answers(fake):
  way, link = fake
  link.write(_ROW, 1.0)
  assert link.fetch(-1)[0] == 7
  way.where = 'b'
  way.places['b'].version = 3
  assert link.report(_REPORT)
  link.write(_ROW, 1.0)
  assert (way.places['a'].rows, way.places['b'].rows) == (1, 1)
  assert way.places['a'].closed == 2
  assert link.fetch(7)[0] == 3
  assert link.fetch(3) is None
  assert link.reconnections == 2


def test_without_an_address_the_old_one_is_kept(fake):
  way, link = fake
  way.where = None
  link.write(_ROW, 1.0)
  assert way.places['a'].rows == 1
  assert link.reconnections == 0


def test_the_same_parameters_do_not_come_twice_over_a_new_connection(fake):
  way, link = fake
  assert link.fetch(-1)[0] == 7
  way.places['a'].gone = True
  with pytest.raises(transport.TransportError, match='nobody at a'):
    link.fetch(7)
  way.places['a'].gone = False
  way.places['a'].learner = ''  # As a new client's is.
  assert link.fetch(7) is None
  assert link.reconnections == 1


def test_between_attempts_it_fails_at_once(fake, monkeypatch):
  way, link = fake
  monkeypatch.setattr(learner_link, '_FIRST_PAUSE', 1000.0)
  monkeypatch.setattr(learner_link, '_LONGEST_PAUSE', 1000.0)
  way.places['a'].gone = True
  for _ in range(5):
    with pytest.raises(transport.TransportError, match='nobody at a'):
      link.write(_ROW, 1.0)
  assert way.places['a'].opened == 2  # By the constructor alone.
  way.places['a'].gone = False
  with pytest.raises(transport.TransportError):
    link.write(_ROW, 1.0)
  way.where = 'b'  # No pause for another place.
  link.write(_ROW, 1.0)
  assert way.places['b'].rows == 1


def test_a_full_queue_is_no_failure(fake):
  way, link = fake

  def full(row, timeout):
    raise TimeoutError('full')

  way.places['a'].write = full
  with pytest.raises(TimeoutError, match='full'):
    link.write(_ROW, 1.0)
  assert (way.places['a'].closed, link.reconnections) == (0, 0)


def test_a_learner_that_leaves_gets_no_more_and_is_waited_for(fake):
  way, link = fake
  way.places['a'].stopping = True
  with pytest.raises(transport.TransportError, match='a is leaving'):
    link.report(_REPORT)
  with pytest.raises(transport.TransportError, match='a is leaving'):
    link.write(_ROW, 1.0)
  with pytest.raises(transport.TransportError, match='a is leaving'):
    link.fetch(0)
  assert way.places['a'].rows == 0
  # Another takes its place at the same address.
  way.places['a'].stopping = False
  assert link.report(_REPORT)
  link.write(_ROW, 1.0)
  assert way.places['a'].rows == 1
  way.places['a'].stopping = True
  with pytest.raises(transport.TransportError, match='a is leaving'):
    link.report(_REPORT)
  way.where = 'b'
  link.write(_ROW, 1.0)
  assert way.places['b'].rows == 1


@pytest.mark.parametrize('state', ['stopping', 'gone'])
def test_the_end_of_the_run_is_the_end(fake, state):
  way, link = fake
  setattr(way.places['a'], state, True)
  with pytest.raises(transport.TransportError):
    link.report(_REPORT)
  way.over = True
  assert link.report(_REPORT) is False


def test_without_a_supervisor_the_learners_word_counts():
  way = FakeWay()
  link = learner_link.LearnerLink(way, way.address())
  way.places['a'].stopping = True
  assert link.report(_REPORT) is False


def test_a_closed_link_stays_closed(fake):
  _, link = fake
  link.close()
  link.close()
  with pytest.raises(transport.Closed):
    link.write(_ROW, 1.0)


def test_a_connection_that_cannot_be_made_is_an_error_at_once():
  way = FakeWay()

  def refuse(address):
    raise ValueError('no such program')

  way.writer = refuse
  with pytest.raises(ValueError, match='no such program'):
    learner_link.LearnerLink(way, way.address())
  assert way.places['a'].closed == 1


def test_waiting_for_a_learner_ends(tmp_path, monkeypatch):
  way = locator.Locator(tmp_path, 0, 'tcp', layout())
  assert learner_link.open_link(way, lambda: True, writes=True) is None
  monkeypatch.setattr(learner_link, '_START', 0.3)
  with pytest.raises(TimeoutError, match='no learner wrote its address'):
    learner_link.open_link(way, lambda: False, writes=True)


@pytest.mark.parametrize('text', ['soon', '-1', 'inf', 'nan', '0'])
def test_patience_that_is_no_time(monkeypatch, text):
  monkeypatch.setenv('IMPALA_PATIENCE', text)
  with pytest.raises(ValueError, match=f"IMPALA_PATIENCE is '{text}'"):
    role_environment.RoleEnvironment.read()


def test_patience(monkeypatch):
  monkeypatch.delenv('IMPALA_PATIENCE', raising=False)
  assert role_environment.RoleEnvironment.read().patience is None
  monkeypatch.setenv('IMPALA_PATIENCE', '43200.0')
  assert role_environment.RoleEnvironment.read().patience == 43200
