"""Learners meet, agree on each update, and notice when one of them is gone or hangs.

Threads stand in for the processes; what would end a process is noted instead.
"""

import contextlib
import json
import random
import socket
import threading
import time

import pytest

from impala_jax.distributed.gang import gang as learner_gang
from impala_jax.distributed.gang import meeting
from impala_jax.distributed.gang import start as gang_start
from impala_jax.learning.agreement import Verdict
from impala_jax.runtime.role_environment import RoleEnvironment

never = lambda: False


def in_threads(*works):
  """Runs all at once; their results in order, or the error of the first that failed."""
  results = [None] * len(works)

  def run(index):
    try:
      results[index] = works[index]()
    except Exception as e:
      results[index] = e

  threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  assert not any(t.is_alive() for t in threads)
  for result in results:
    if isinstance(result, Exception):
      raise result
  return results


def meet(run_dir, count):
  first, *others = in_threads(
    lambda: meeting.receive_from_others(run_dir, '', count, never),
    *(lambda i=i: meeting.reach_first(run_dir, i, never) for i in range(1, count)),
  )
  return [first, *({0: connection} for connection in others)]


@pytest.fixture
def gangs(tmp_path):
  """Makes the learners of a gang; `left` has the causes with which they would end."""
  made = []

  def make(count):
    for index, connections in enumerate(meet(tmp_path, count)):
      left = []
      gang = learner_gang.Gang(index, count, connections, left.append)
      gang.left, gang.connections = left, connections
      made.append(gang)
    return made

  yield make
  for gang in made:
    gang._ended.set()
  for gang in made:
    gang._watcher.join(10)
    for connection in gang.connections.values():
      connection.close()


def decided(gang):
  """The verdict for one that has a batch."""
  while (verdict := gang.decide(True, False)) is Verdict.WAIT:
    pass
  return verdict


def wait_for(condition, seconds=60):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_learners_meet_whatever_knocks_besides(tmp_path):
  # What an earlier start left behind, on a port where nobody listens now.
  with socket.create_server(('127.0.0.1', 0)) as old:
    port = old.getsockname()[1]
  stale = {'host': '127.0.0.1', 'port': port, 'token': 'old'}
  (tmp_path / 'gang.json').write_text(json.dumps(stale))

  def stranger(words):
    place = stale
    while place['token'] == 'old':
      time.sleep(0.05)
      place = json.loads((tmp_path / 'gang.json').read_text())
    try:
      with socket.create_connection((place['host'], place['port'])) as connection:
        connection.sendall(words)
        connection.settimeout(30)
        return connection.recv(100)
    except ConnectionError:
      return b''

  first, second, third, *answers = in_threads(
    lambda: meeting.receive_from_others(tmp_path, '', 3, never),
    lambda: meeting.reach_first(tmp_path, 1, never),
    lambda: meeting.reach_first(tmp_path, 2, never),
    lambda: stranger(b'["hello", "old", 1]\n'),
    lambda: stranger(b'["hello", 7, 9]\n'),
    lambda: stranger(b'GET / HTTP/1.1\r\n\r\n'),
  )
  assert sorted(first) == [1, 2]
  # Refused, or nobody was listening any more.
  assert answers == [b''] * 3
  for index, connection in ((1, second), (2, third)):
    connection.send('it is', index)
    assert first[index].receive(30) == ['it is', index]
    connection.close()
    with pytest.raises(meeting.GangError, match=f'learner {index} has left'):
      first[index].receive(30)
    first[index].close()


def _place(run_dir):
  """Where learner 0 waits, as a stranger finds it."""
  wait_for((run_dir / 'gang.json').exists)
  place = json.loads((run_dir / 'gang.json').read_text())
  return (place['host'], place['port']), place['token']


@pytest.mark.parametrize(
  'words',
  [
    b'["hello", "\xff\xfe", 1]\n',
    b'["hello", "\\ud800", 1]\n',
    b'[' * 60_000 + b'\n',
    b'[' * 60_000,
    b'\n' * 10,
    b'\x00',
    b'',
  ],
  ids=range(7),
)
def test_nothing_a_stranger_says_ends_the_meeting(tmp_path, words):
  def stranger():
    address, _ = _place(tmp_path)
    for _ in range(10):
      with (
        contextlib.suppress(OSError),
        socket.create_connection(address) as connection,
      ):
        connection.sendall(words)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)

  first, _, other = in_threads(
    lambda: meeting.receive_from_others(tmp_path, '', 2, never),
    stranger,
    # Which comes after it.
    lambda: (stranger(), meeting.reach_first(tmp_path, 1, never))[1],
  )
  other.send('it is', 1)
  assert first[1].receive(30) == ['it is', 1]
  for connection in (first[1], other):
    connection.close()


def test_the_silent_hold_nobody_up_and_the_dead_are_not_taken_for_learners(tmp_path):
  """A learner whose call was given up for lost calls again; both lie in wait."""
  with contextlib.ExitStack() as stack:

    def strangers():
      address, token = _place(tmp_path)
      assert (tmp_path / 'gang.json').stat().st_mode & 0o777 == 0o600
      for _ in range(200):
        stack.enter_context(socket.create_connection(address))
      with socket.create_connection(address) as dead:
        dead.sendall(b'["hello", "%s", 1]\n' % token.encode())
      started = time.monotonic()
      other = meeting.reach_first(tmp_path, 1, never)
      # Far less than the time that each of the silent ones is granted.
      assert time.monotonic() - started < 60
      return other

    first, other = in_threads(
      lambda: meeting.receive_from_others(tmp_path, '', 2, never), strangers
    )
  other.send('it is', 1)
  assert first[1].receive(30) == ['it is', 1]
  for connection in (first[1], other):
    connection.close()


def test_what_a_stranger_answers_in_the_place_of_learner_0_is_no_error(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(meeting, '_MEET_TIMEOUT', 0.3)
  for answer in (b'[' * 60_000 + b'\n', b'\xff\n', b'{}\n', b''):
    with socket.create_server(('127.0.0.1', 0)) as server:
      place = {'host': '127.0.0.1', 'port': server.getsockname()[1], 'token': 'x'}
      (tmp_path / 'gang.json').write_text(json.dumps(place))

      def serve(server=server, answer=answer):
        with contextlib.suppress(OSError):
          while True:
            with server.accept()[0] as connection:
              connection.sendall(answer)

      threading.Thread(target=serve, daemon=True).start()
      with pytest.raises(meeting.GangError, match='learner 0 did not answer'):
        meeting.reach_first(tmp_path, 1, never)
      server.shutdown(socket.SHUT_RDWR)
  for place in ([], {}, {'host': 1, 'port': {}}, {'host': 'x', 'port': 2**40}):
    (tmp_path / 'gang.json').write_text(json.dumps(place))
    with pytest.raises(meeting.GangError, match='learner 0 did not answer'):
      meeting.reach_first(tmp_path, 1, never)


def test_waiting_for_the_others_ends_when_told_or_after_a_while(tmp_path, monkeypatch):
  assert meeting.receive_from_others(tmp_path, '', 2, lambda: True) is None
  assert meeting.reach_first(tmp_path, 1, lambda: True) is None
  monkeypatch.setattr(meeting, '_MEET_TIMEOUT', 0.3)
  with pytest.raises(meeting.GangError, match='learners 1, 2 of 3 did not come'):
    meeting.receive_from_others(tmp_path, '', 3, never)
  with pytest.raises(meeting.GangError, match='learner 0 did not answer'):
    meeting.reach_first(tmp_path, 1, never)


def test_an_update_begins_when_all_have_a_batch_and_not_before(gangs):
  first, second, third = gangs(3)
  for _ in range(3):
    assert [g.decide(True, False) for g in (second, third)] == [Verdict.WAIT] * 2
    assert first.decide(False, False) is Verdict.WAIT
    assert in_threads(*(lambda g=g: decided(g) for g in (first, second, third))) == (
      [Verdict.GO] * 3
    )
  assert first.decide(True, False) is Verdict.WAIT
  assert second.decide(True, False) is Verdict.WAIT


@pytest.mark.parametrize('stopper', [0, 1, 2])
def test_all_carry_out_the_same_number_of_updates(gangs, stopper):
  made = gangs(3)

  def learn(gang):
    rng = random.Random(gang.index)
    updates, batch = 0, False
    while True:
      # The one that stops has no batch by then, and never gets one.
      wants = gang.index == stopper and updates >= 20
      batch = batch or (not wants and rng.random() < 0.5)
      verdict = gang.decide(batch, wants)
      if verdict is Verdict.STOP:
        return updates
      if verdict is Verdict.GO:
        assert batch
        updates, batch = updates + 1, False

  assert in_threads(*(lambda g=g: learn(g) for g in made)) == [20] * 3
  assert [g.stopped_by for g in made] == [
    None if g.index == stopper else stopper for g in made
  ]


def test_one_that_has_gone_ends_the_others_with_a_cause(gangs):
  first, second, _ = gangs(3)
  # As the kernel does for a process that was killed.
  second.connections[0].close()
  wait_for(lambda: first.left)
  assert first.left == ['GangError: learner 1 has left; its own log says why']


def test_one_that_fails_says_why_and_one_that_fails_with_it_says_who(gangs):
  first, second = gangs(2)
  with pytest.raises(OSError, match='disk full'), second.together():
    raise OSError('disk full')
  assert second.left == ['OSError: disk full']
  second.connections[0].close()
  with pytest.raises(RuntimeError), first.together():
    raise RuntimeError('the collective failed')
  assert first.left == ['GangError: learner 1 has left; its own log says why']


def test_an_update_that_does_not_end_ends_the_process(gangs, monkeypatch):
  monkeypatch.setattr(learner_gang, '_FIRST_PATIENCE', 0.5)
  first, second = gangs(2)
  with first.updating():
    wait_for(lambda: first.left)
  assert 'an update has not ended within 0 s' in first.left[0]
  with second.updating():
    pass
  time.sleep(1.0)
  assert not second.left


@pytest.mark.parametrize('silent', [0, 1])
def test_one_that_says_nothing_ends_the_others(gangs, monkeypatch, silent):
  monkeypatch.setattr(learner_gang, '_FIRST_PATIENCE', 2.0)
  made = gangs(2)
  with pytest.raises(meeting.GangError, match=f'learner {silent} has said nothing'):
    decided(made[1 - silent])
  assert made[silent].left == []


def test_waiting_for_batches_is_not_silence(gangs, monkeypatch):
  monkeypatch.setattr(learner_gang, '_FIRST_PATIENCE', 5.0)
  monkeypatch.setattr(learner_gang, '_PING', 0.1)
  made = gangs(2)

  def wait(gang):
    deadline = time.monotonic() + 7.0
    while time.monotonic() < deadline:
      # Learner 1 has its batch all the time, learner 0 has none.
      assert gang.decide(gang.index == 1, False) is Verdict.WAIT
      time.sleep(0.05)

  in_threads(*(lambda g=g: wait(g) for g in made))


def test_words_of_learner_0_and_the_end(gangs):
  made = gangs(3)

  def live(gang):
    gang.gather()
    heard = gang.spread({'step': 7} if gang.index == 0 else None)
    gang.finish()
    if gang.index:
      gang.connections[0].close()  # The process ends.
    return heard

  assert in_threads(*(lambda g=g: live(g) for g in made)) == [{'step': 7}] * 3
  assert [g.left for g in made] == [[]] * 3


def test_one_learner_waits_for_nobody(tmp_path):
  alone = gang_start.join(RoleEnvironment(tmp_path), never)
  assert (alone.index, alone.count) == (0, 1)
  assert alone.decide(False, False) is Verdict.WAIT
  assert alone.decide(True, False) is Verdict.GO
  assert alone.decide(True, True) is Verdict.STOP
  assert alone.spread('this') == 'this'
  with pytest.raises(KeyError), alone.together():
    raise KeyError
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('environment', 'words'),
  [
    ({'IMPALA_COUNT': 'two'}, r"IMPALA_COUNT is 'two': must lie in \[1, 65536\)"),
    ({'IMPALA_COUNT': '2', 'IMPALA_INDEX': '2'}, r"IMPALA_INDEX is '2'.*\[0, 2\)"),
  ],
)
def test_impossible_places_are_named(tmp_path, environment, words):
  with pytest.raises(ValueError, match=words):
    gang_start.join(RoleEnvironment.read(environment), never)
