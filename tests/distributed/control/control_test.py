"""Parameters and reports, in one process and over gRPC."""

import dataclasses
import functools
import logging
import math
import re
import threading
import time

import grpc
import jax
import msgpack
import numpy as np
import pytest

from impala_jax.distributed.control import board, protocol, reporter, wire
from impala_jax.distributed.control import grpc as control_grpc
from impala_jax.distributed.transport import protocol as transport
from impala_jax.learning import learner as learner_lib
from tests import synthetic

_LEVELS = ('first', 'second')
_PROCESSES = {'evaluator': range(1), 'learner': range(1, 3), 'inference': range(0)}
_EVENTS = (
  protocol.Episode(1, -2.5, 7),
  protocol.EnvironmentFailure(3, 1, 0, 'it exited with code 1'),
  protocol.Evaluation(
    1e9,
    5,
    500,
    2.0,
    {'first': 2.0},
    {'sum': 2.0},
    {'first': [1.0, 3.0]},
    {'second': 'EngineError: none'},
  ),
)


def _published(version: int) -> board.Board:
  control = board.Board(_LEVELS)
  learner = synthetic.make_learner(synthetic.config(), 2)
  params = learner.init(version).params
  control.publish(version, functools.partial(learner_lib.to_host, params))
  return control


def _report(index=0, incarnation=0, steps=0.0, events=()) -> protocol.Report:
  totals = {'agent_steps': steps}
  return protocol.Report('actor', index, incarnation, totals, events=events)


def _same(a, b) -> None:
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_fetch_gives_the_newest_and_only_if_newer():
  control = _published(4)
  version, params = control.fetch(-1)
  assert version == 4
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))
  assert control.fetch(4) is None
  assert board.Board().fetch(-1) is None


def test_grpc_client_sees_the_same():
  control = _published(4)
  server = control_grpc.Server(control)
  client = control_grpc.Client(server.address, timeout=5.0)
  version, params = client.fetch(-1)
  assert version == 4
  _same(params, control.fetch(-1)[1])
  assert client.fetch(4) is None
  report = protocol.Report('actor', 3, 1, {'n': 3.0}, {'m': -1.0}, _EVENTS, True)
  assert client.report(report) is True
  assert control.drain_events() == list(_EVENTS)
  (peer,) = control.peers()
  assert peer.report == dataclasses.replace(report, events=())
  control.stop()
  assert client.report(_report()) is False
  assert control.refusals.total == 0
  client.close()
  server.close()


def test_versions_of_another_learner_do_not_count():
  before, after = _published(9), _published(4)
  assert after.fetch(9) is None
  assert after.fetch(9, of=after.identity) is None
  assert after.fetch(9, of=before.identity)[0] == 4
  assert board.Board().fetch(9, of=before.identity) is None  # None yet.

  def ask(control, client_of=''):
    server = control_grpc.Server(control)
    client = control_grpc.Client(server.address, timeout=20.0)
    client.learner = client_of
    try:
      return client.fetch(9), client.learner
    finally:
      client.close()
      server.close()

  (version, _), learner = ask(after, before.identity)
  assert (version, learner) == (4, after.identity)
  assert ask(after, after.identity) == (None, after.identity)
  assert ask(after)[0][0] == 4  # Whose version 9 it is nobody knows.


def test_a_learner_that_is_gone_is_an_error_in_bounded_time():
  control = _published(0)
  server = control_grpc.Server(control)
  client = control_grpc.Client(server.address, timeout=2.0)
  server.close()
  with pytest.raises(transport.TransportError, match=r'127\.0\.0\.1'):
    client.fetch(-1)
  client.close()


def test_a_taken_port_is_refused():
  control = board.Board()
  server = control_grpc.Server(control)
  with pytest.raises(OSError, match=str(server.port)):
    control_grpc.Server(control, port=server.port)
  server.close()


def test_totals_outlive_a_restart():
  control = board.Board()
  control.report(_report(steps=10.0))
  control.report(_report(steps=30.0))
  control.report(_report(index=1, steps=5.0))
  assert control.total('actor', 'agent_steps') == 35
  control.report(_report(incarnation=1, steps=2.0))
  assert control.total('actor', 'agent_steps') == 37
  assert control.total('evaluator', 'agent_steps') == 0


def test_a_failed_report_keeps_its_events():
  class Flaky:
    calls = 0

    def report(self, report):
      self.calls += 1
      if self.calls == 1:
        raise transport.TransportError('gone')
      self.events = report.events
      return True

  control = Flaky()
  made = reporter.Reporter(control, 'actor', 0, 0, interval=0.0)
  made.add(_EVENTS[0])
  with pytest.raises(transport.TransportError):
    made.maybe_report({})
  assert made.unheard > 0
  assert made.maybe_report({})
  assert made.unheard == 0
  assert control.events == _EVENTS[:1]
  assert made.maybe_report({})
  assert control.events == ()


def _message(**changes):
  return {**msgpack.unpackb(wire.pack(_report(steps=1.0))), **changes}


def _event(which=0, **changes):
  return {**msgpack.unpackb(msgpack.packb(wire.plain(_EVENTS[which]))), **changes}


def _without(message, field):
  return {k: v for k, v in message.items() if k != field}


@pytest.mark.parametrize(
  ('message', 'words'),
  [
    (b'', 'report'),
    (b'\xc1', 'report'),
    (b'\x91' * 100_000, 'report'),
    (msgpack.packb({b'\xff': 1, 'events': []}), 'fields of report'),
    (msgpack.packb([]), r'report is \[\]: must be a map'),
    (_message(role='king'), "report.role is 'king': must be one of actor, evaluator"),
    (_message(role=['actor']), 'report.role'),
    (_message(index=-1), 'report.index is -1: must be a whole number'),
    (_message(index=True), 'report.index'),
    (_message(index=1.0), 'report.index'),
    (_message(incarnation=2**63), 'report.incarnation'),
    (_message(totals=[1]), 'report.totals'),
    (_message(totals={'lost': 'x'}), r"totals\['lost'\] is 'x': must be a number"),
    (_message(totals={'lost': math.nan}), 'totals'),
    (_message(totals={'lost': 1e300}), 'totals'),
    (_message(gauges={'m': None}), 'gauges'),
    (_message(left=1), 'report.left is 1: must be of type bool'),
    (_message(events={}), r'report.events is \{\}: must be a list'),
    (_message(more=1), 'fields of report'),
    (_without(_message(), 'totals'), 'fields of report'),
  ],
)
def test_a_report_that_makes_no_sense_is_refused(message, words):
  packed = message if isinstance(message, bytes) else msgpack.packb(message)
  with pytest.raises(wire.Refused, match=words):
    wire.unpack(packed, _LEVELS)


@pytest.mark.parametrize(
  ('event', 'words'),
  [
    (None, 'event is None: must be a map'),
    ({}, 'event.kind is None: must be one of episode, environment_failure'),
    (_event(kind='x'), "event.kind is 'x'"),
    (_event(kind=['episode']), 'event.kind'),
    (_event(task_id=2), 'episode.task_id is 2: must be below 2'),
    (_event(task_id=-1), 'episode.task_id'),
    (_event(task_id='0'), 'episode.task_id'),
    (_event(episode_return=math.inf), 'episode.episode_return is inf: must be a num'),
    (_event(length=1.5), 'episode.length'),
    (_without(_event(), 'length'), 'fields of episode'),
    (_event(1, cause=3), 'environment_failure.cause is 3: must be of type str'),
    (_event(1, task_id=9), 'environment_failure.task_id is 9'),
    (_event(2, means={'else': 1.0}), r"evaluation.means is \['else'\]"),
    (_event(2, means={'first': 'x'}), 'evaluation.means'),
    (_event(2, returns={'first': 1.0}), 'evaluation.returns'),
    (_event(2, returns={'first': [None]}), 'evaluation.returns'),
    (_event(2, scores=3), 'evaluation.scores'),
  ],
)
def test_an_event_that_makes_no_sense_is_refused_alone(event, words):
  message = _message(events=[_event(), event, _event()])
  report, refused = wire.unpack(msgpack.packb(message), _LEVELS)
  assert report.events == [_EVENTS[0]] * 2
  (why,) = refused
  assert re.search(words, str(why))


def test_strangers_are_counted_and_harm_nobody(caplog):
  caplog.set_level(logging.WARNING)
  control = _published(4)
  server = control_grpc.Server(control)
  client = control_grpc.Client(server.address, timeout=20.0)
  channel = grpc.insecure_channel(server.address)
  call = lambda method, sent: channel.unary_unary(f'/impala_jax.Control/{method}')(
    sent, timeout=20.0
  )
  for method, sent in (
    ('Report', b'\xc1'),
    ('Report', msgpack.packb(_message(role='learner', totals={'lost': 'x'}))),
    ('Fetch', b''),
    ('Fetch', msgpack.packb({'have_version': '4', 'of': ''})),
    ('Fetch', msgpack.packb({'have_version': 4})),
  ):
    with pytest.raises(grpc.RpcError) as found:
      call(method, sent)
    assert found.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert 'must be' in found.value.details() or sent in (b'', b'\xc1')
  assert control.refusals.total == 5
  assert control.peers() == []
  sent = msgpack.packb(_message(events=[_event(task_id=9), _event(), {}]))
  assert msgpack.unpackb(call('Report', sent)) is True
  assert control.refusals.total == 7
  assert control.drain_events() == [_EVENTS[0]]
  assert client.report(_report(steps=8.0))
  assert control.total('actor', 'agent_steps') == 8
  # One line a minute, however many there are.
  assert len([r for r in caplog.records if 'refused' in r.message]) == 1
  with pytest.raises(transport.TransportError, match=r'refused: .*report\.index is -1'):
    client.report(_report(index=-1))
  channel.close()
  client.close()
  server.close()


@pytest.mark.parametrize(
  ('message', 'words'),
  [
    (bytes(wire.LARGEST + 1), r'size of report is \d+: must be at most \d+ bytes'),
    (_message(events=[{}] * (wire.MOST_EVENTS + 1)), 'report.events .*at most 1000'),
    (_message(totals={f'n{i}': 1.0 for i in range(101)}), 'totals .*at most 100 names'),
    (_message(gauges={'x' * 101: 1.0}), 'gauges .*names of at most 100 letters'),
    (msgpack.packb([0] * 200_000), 'report is .*: must be msgpack'),
    (msgpack.packb(msgpack.Timestamp(1)), 'report'),
    (_message(role='learner', index=0), r"role learner is 0: .*run's learner proc"),
    (_message(role='learner', index=3), 'role learner is 3'),
    (_message(role='evaluator', index=1), 'role evaluator is 1'),
    (_message(role='inference'), 'role inference is 0'),
  ],
)
def test_what_is_too_large_or_of_no_process_of_the_run_is_refused(message, words):
  packed = message if isinstance(message, bytes) else msgpack.packb(message)
  with pytest.raises(wire.Refused, match=words):
    wire.unpack(packed, _LEVELS, _PROCESSES)


def test_actors_come_and_go():
  for message in (
    _message(index=9),
    _message(role='learner', index=2),
    _message(role='evaluator'),
  ):
    report, _ = wire.unpack(msgpack.packb(message), _LEVELS, _PROCESSES)
    assert report.index == message['index']


def test_long_causes_are_cut_and_many_events_are_told_one_report_after_the_other():
  control = board.Board(_LEVELS)
  long = protocol.EnvironmentFailure(0, 0, 0, 'x' * 5000)
  report, refused = wire.unpack(wire.pack(_report(events=[long])), _LEVELS)
  assert (refused, len(report.events[0].cause)) == ([], 1000)

  sizes = []

  class Door:
    def report(self, report):
      sizes.append((len(report.events), report.left))
      made, refused = wire.unpack(wire.pack(report), _LEVELS)
      assert not refused
      return control.report(made)

  made = reporter.Reporter(Door(), 'actor', 0, 0)
  for i in range(2500):
    made.add(protocol.Episode(0, float(i), 1))
  assert made.maybe_report({}, left=True)
  assert sizes == [(1000, False), (1000, False), (500, True)]
  assert [e.episode_return for e in control.drain_events()] == list(range(2500))


def test_invented_processes_are_bounded_and_take_no_room_of_the_runs_own(monkeypatch):
  monkeypatch.setattr(board, '_MOST_OTHERS', 10)
  control = board.Board(_LEVELS, {'actor': range(2)})
  for index in range(100, 200):
    control.report(_report(index, steps=1.0))
  assert len(control.peers()) == 10
  assert control.refusals.total == 90
  assert control.total('actor', 'agent_steps') == 10
  for index in range(2):
    control.report(_report(index, steps=5.0))
  assert {0, 1} < {p.report.index for p in control.peers()}
  assert control.total('actor', 'agent_steps') == 20
  # One that has been silent for long makes room for the actor that came later.
  monkeypatch.setattr(board, '_SILENT', 0.0)
  control.report(_report(7, steps=3.0))
  assert {0, 1, 7} < {p.report.index for p in control.peers()}
  assert len(control.peers()) == 12
  assert control.total('actor', 'agent_steps') == 23


def test_totals_are_added_up_once_though_a_stranger_reports_in_between():
  control = board.Board()
  for steps in range(10):
    control.report(_report(incarnation=3, steps=100.0 + steps))
    control.report(_report(incarnation=9, steps=1.0))
  assert control.total('actor', 'agent_steps') == 110


def test_memory_for_names_and_events_is_bounded(monkeypatch):
  monkeypatch.setattr(board, '_MOST_NAMES', 5)
  monkeypatch.setattr(board, '_MOST_EVENTS', 3)
  control = board.Board()
  for i in range(9):
    control.report(protocol.Report('actor', 0, i, {f'n{i}': 1.0}, {}, _EVENTS[:1]))
  assert len(control.drain_events()) == 3
  assert control.total('actor', 'n4') == 1
  assert control.total('actor', 'n5') == 0
  assert control.refusals.by_sender() == {'actor 0': 6}


def _await_refused(control, count):
  """A client may hear of it before it is counted."""
  end = time.monotonic() + 30.0
  while control.refusals.total < count and time.monotonic() < end:
    time.sleep(0.01)
  assert control.refusals.total == count


def test_no_call_holds_the_door(monkeypatch):
  monkeypatch.setattr(control_grpc, '_PATIENCE', 0.5)
  monkeypatch.setattr(control_grpc, '_THREADS', 2)
  control = _published(4)
  server = control_grpc.Server(control)
  client = control_grpc.Client(server.address, timeout=20.0)
  channel = grpc.insecure_channel(
    server.address, options=[('grpc.max_send_message_length', -1)]
  )
  ended = threading.Event()

  def nothing():
    ended.wait(60.0)
    yield from ()

  report = channel.stream_unary('/impala_jax.Control/Report')
  silent = [report.future(nothing()) for _ in range(6)]
  assert client.report(_report())
  for call in silent:
    assert isinstance(call.exception(timeout=30.0), grpc.RpcError)
  ended.set()
  _await_refused(control, 6)
  for method in ('Report', 'Fetch'):
    with pytest.raises(grpc.RpcError) as found:
      channel.unary_unary(f'/impala_jax.Control/{method}')(
        bytes(2 * wire.LARGEST), timeout=20.0
      )
    assert found.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
  _await_refused(control, 8)
  assert control.refusals.by_sender() == {'ipv4:127.0.0.1': 8}
  channel.close()
  client.close()
  server.close()


def test_who_calls_too_often_is_refused_and_others_are_served(monkeypatch):
  monkeypatch.setattr(control_grpc, '_CALLS_PER_SECOND', 0.01)
  monkeypatch.setattr(control_grpc, '_CALLS_AT_ONCE', 5)
  control = _published(4)
  server = control_grpc.Server(control)
  fast, other = (control_grpc.Client(server.address, timeout=20.0) for _ in range(2))
  for _ in range(5):
    assert fast.report(_report(index=1))
  for _ in range(3):
    with pytest.raises(transport.TransportError, match='resource_exhausted'):
      fast.report(_report(index=1))
  assert control.refusals.total == 3
  assert other.report(_report(index=2))
  for part in (fast, other, server):
    part.close()
