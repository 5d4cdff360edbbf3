"""Parameters and reports, in one process and over gRPC."""

import jax
import numpy as np
import pytest

from impala_jax.distributed.control import board as control_lib
from impala_jax.distributed.control import grpc as control_grpc
from impala_jax.distributed.transport import protocol as transport
from tests import synthetic


def _published(version: int) -> control_lib.Control:
  control = control_lib.Control()
  learner = synthetic.make_learner(synthetic.config(), 2)
  control.publish(version, learner.init(version).params)
  return control


def _same(a, b) -> None:
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_fetch_gives_the_newest_and_only_if_newer():
  control = _published(4)
  version, params = control.fetch(-1)
  assert version == 4
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))
  assert control.fetch(4) is None
  assert control_lib.Control().fetch(-1) is None


def test_grpc_client_sees_the_same():
  control = _published(4)
  server = control_grpc.Server(control)
  client = control_grpc.Client(server.address, timeout=5.0)
  version, params = client.fetch(-1)
  assert version == 4
  _same(params, control.fetch(-1)[1])
  assert client.fetch(4) is None
  assert client.report('actor', 0, 0, {'agent_steps': 3.0}, [{'kind': 'x'}]) is True
  assert control.drain_events() == [{'kind': 'x'}]
  control.stop()
  assert client.report('actor', 0, 0, {'agent_steps': 3.0}, []) is False
  client.close()
  server.close()


def test_versions_of_another_learner_do_not_count():
  before, after = _published(9), _published(4)
  assert after.fetch(9) is None
  assert after.fetch(9, of=after.identity) is None
  assert after.fetch(9, of=before.identity)[0] == 4
  assert control_lib.Control().fetch(9, of=before.identity) is None  # None yet.

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
  control = control_lib.Control()
  server = control_grpc.Server(control)
  with pytest.raises(OSError, match=str(server.port)):
    control_grpc.Server(control, port=server.port)
  server.close()


def test_totals_outlive_a_restart():
  control = control_lib.Control()
  control.report('actor', 0, 0, {'agent_steps': 10.0}, [])
  control.report('actor', 0, 0, {'agent_steps': 30.0}, [])
  control.report('actor', 1, 0, {'agent_steps': 5.0}, [])
  assert control.total('actor', 'agent_steps') == 35
  control.report('actor', 0, 1, {'agent_steps': 2.0}, [])
  assert control.total('actor', 'agent_steps') == 37
  assert control.total('evaluator', 'agent_steps') == 0


def test_a_failed_report_keeps_its_events():
  class Flaky:
    calls = 0

    def report(self, role, index, incarnation, totals, events):
      self.calls += 1
      if self.calls == 1:
        raise transport.TransportError('gone')
      self.events = list(events)
      return True

  control = Flaky()
  reporter = control_lib.Reporter(control, 'actor', 0, 0, interval=0.0)
  reporter.add({'kind': 'episode'})
  with pytest.raises(transport.TransportError):
    reporter.maybe_report({})
  assert reporter.unheard > 0
  assert reporter.maybe_report({})
  assert reporter.unheard == 0
  assert control.events == [{'kind': 'episode'}]
