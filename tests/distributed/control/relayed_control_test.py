"""What a learner's actors report arrives at learner 0, once, whatever fails between."""

import time

import pytest

from impala_jax.distributed.control import board, protocol
from impala_jax.distributed.control import relay as relay_lib
from impala_jax.distributed.transport import protocol as transport


class FirstLearner(board.Board):
  """In the place of the connection to learner 0."""

  def __init__(self):
    super().__init__()
    self.away = True
    self.refused = 0

  def report(self, report):
    if self.away:
      self.refused += 1
      raise transport.TransportError('out of reach')
    return super().report(report)

  def close(self):
    self.away = True


@pytest.fixture
def pair(monkeypatch):
  monkeypatch.setattr(relay_lib, '_INTERVAL', 0.05)
  relayed = relay_lib.Relay(['level'], 1, 5)
  yield relayed, FirstLearner()
  relayed.end_relay()


def stats():
  return transport.ReaderStats(received=30, lost=2, queued=4, capacity=8)


def test_everything_arrives_once_though_learner_0_was_away(pair):
  relayed, first = pair
  relayed.relay(first, stats)
  relayed.keep({'policy_lag_mean': 1.5, 'policy_lag_max': 3})
  for steps in (10, 20):
    events = (protocol.Episode(0, steps, 3),)
    assert relayed.report(
      protocol.Report('actor', 3, 0, {'agent_steps': steps}, events=events)
    )
  # It died and came back before anything was handed on.
  assert relayed.report(protocol.Report('actor', 3, 1, {'agent_steps': 7}))
  before = first.refused
  # The second one after these reports cannot have missed them.
  deadline = time.monotonic() + 60
  while first.refused < before + 2 and time.monotonic() < deadline:
    time.sleep(0.01)
  assert first.refused >= before + 2
  first.away = False
  relayed.end_relay()
  assert first.away
  assert first.total('actor', 'agent_steps') == 27
  assert [e.episode_return for e in first.drain_events()] == [10, 20]
  (learner,) = (p for p, _ in first.peers() if p.role == 'learner')
  assert (learner.index, learner.incarnation) == (1, 5)
  assert learner.totals['received'] == 30
  assert learner.totals['lost'] == 2
  assert learner.gauges['queued'] == 4
  assert learner.gauges['policy_lag_mean'] == 1.5
  assert learner.gauges['policy_lag_max'] == 3
  assert learner.totals['parameter_fetches'] == 0
  # The learner has them, too.
  assert relayed.total('actor', 'agent_steps') == 27


def test_it_says_when_to_stop(pair):
  relayed, _ = pair
  relayed.stop()
  assert not relayed.report(protocol.Report('actor', 0, 0, {}))


def test_what_is_kept_is_bounded(pair, monkeypatch):
  monkeypatch.setattr(relay_lib, '_MOST_EVENTS', 3)
  relayed, first = pair
  for number in range(5):
    events = (protocol.Episode(0, number, 1),)
    relayed.report(protocol.Report('actor', 0, 0, {}, events=events))
  assert relayed.lost_events == 2
  relayed.relay(first, stats)
  first.away = False
  relayed.end_relay()
  assert [e.episode_return for e in first.drain_events()] == [2, 3, 4]
