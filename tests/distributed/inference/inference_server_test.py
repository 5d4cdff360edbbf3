"""An inference server and strangers: bad requests, keys, other configurations."""

import socket
import struct
import threading
import time

import jax
import msgpack
import numpy as np
import pytest

from impala_jax import types
from impala_jax.acting import policy as policy_lib
from impala_jax.distributed.control import grpc as control_grpc
from impala_jax.distributed.inference import connection as inference_connection
from impala_jax.distributed.inference import server as inference_tcp
from impala_jax.distributed.inference import wire as inference_wire
from impala_jax.distributed.roles import policies
from impala_jax.distributed.security import keys as run_keys
from impala_jax.distributed.transport import protocol as transport
from tests import synthetic
from tests.distributed.inference import inference_servers
from tests.distributed.inference.inference_servers import request

SPEC = synthetic.SPEC


@pytest.fixture(scope='module')
def agent():
  return synthetic.agent()


@pytest.fixture(scope='module')
def params(agent):
  return jax.tree.map(np.asarray, agent.init(jax.random.key(0)))


@pytest.fixture
def served(agent, params):
  with inference_servers.serving(agent, SPEC, params) as served:
    yield served


_JOIN, _STEP, _LEAVE = range(3)
_REFUSED = 3


class _Raw:
  """A connection that says what it likes."""

  def __init__(self, served):
    host, port = served.address.split(':')
    self._socket = socket.create_connection((host, int(port)), inference_servers.LONG)

  def tell(self, data):
    self._socket.sendall(data)

  def hear(self, size):
    data = b''
    while len(data) < size and (more := self._socket.recv(size - len(data))):
      data += more
    return data

  def ask(self, kind, message):
    """The status with which a message is answered, and the words."""
    self.tell(struct.pack('<II', kind, len(message)) + message)
    status, size = struct.unpack('<II', self.hear(8))
    return status, self.hear(size).decode()

  def close(self):
    self._socket.close()


def test_a_request_and_its_answer_arrive_as_they_are(agent):
  wire = policies.wire(agent, SPEC)
  asked = request(SPEC, 77, [3, 0, 5], begins=True)
  read = wire.read_request(wire.pack_request(asked), 8)
  jax.tree.map(np.testing.assert_array_equal, asked, read)
  state = jax.tree.map(
    lambda x: np.random.default_rng(0).normal(size=(2, *x.shape[1:])).astype(x.dtype),
    agent.initial_state(1),
  )
  decision = policy_lib.Decision(
    np.array([1, 3, 0], np.int32),
    np.zeros(3, np.float32),
    np.ones((3, 4), np.float32),
    state,
    12,
  )
  found = wire.read_reply(wire.pack_reply(77, decision), 3, 2)
  jax.tree.map(np.testing.assert_array_equal, decision, found)
  with pytest.raises(inference_wire.WireError, match='expected 3, 1'):
    wire.read_reply(wire.pack_reply(77, decision), 3, 1)


def _spoilt(served, session):
  """(message, words) of requests that make no sense."""
  good = request(SPEC, session, [0, 1])
  pack = served.wire.pack_request
  step = good.timestep
  bad_type = step._replace(step_type=np.array([1, 9], np.uint8))
  message = pack(good)
  return [
    (b'', 'too short'),
    (b'nonsense' * 9, 'another layout'),
    (message[:-1], 'bytes: 2 rows have'),
    (message + b'x', 'bytes: 2 rows have'),
    (pack(request(SPEC, session, [1, 1])), 'each may be there once'),
    (pack(request(SPEC, session, [0, 2])), 'there are 2'),
    (pack(request(SPEC, session, [-1])), 'there are 2'),
    (pack(request(SPEC, session, list(range(9)))), 'must be 1 to 8'),
    (pack(good._replace(timestep=bad_type)), 'a step type is 9'),
    (pack(good._replace(last_action=np.array([0, 4], np.int32))), 'last action'),
  ]


def test_bad_requests_are_refused_and_harm_nobody(served):
  connection = served.connection()
  session = connection.join('actor 0', 2)
  before = connection.step(request(SPEC, session, [0, 1], begins=True, first=True))
  cases = _spoilt(served, session)
  raw = _Raw(served)
  for message, words in cases:
    status, found = raw.ask(_STEP, message)
    assert status == _REFUSED
    assert words in found
  for message in (
    b'',
    b'\xc1',
    msgpack.packb([1]),
    msgpack.packb({'client': 'x'}),
    msgpack.packb({'client': 'x', 'environments': 'many', 'form': 1}),
    msgpack.packb({'client': 'x', 'environments': 2, 'form': 1}),
    msgpack.packb({'client': 'x', 'environments': -2, 'form': served.wire.fingerprint}),
  ):
    assert raw.ask(_JOIN, message)[0] == _REFUSED
  assert raw.ask(77, b'') == (_REFUSED, 'a message of the kind 77')
  assert raw.ask(_LEAVE, b'')[0] == _REFUSED
  # Larger than anything that makes sense: not even read, and the last of this client.
  raw.tell(struct.pack('<II', _STEP, 10_000_000))
  status, size = struct.unpack('<II', raw.hear(8))
  assert status == _REFUSED
  assert raw.hear(size).startswith(b'10000000 bytes: at most')
  assert raw.hear(1) == b''
  assert served.batcher.totals().refused == len(cases) + 10
  # Half a message, and then nothing.
  for part in (b'\1', struct.pack('<II', _STEP, 100) + b'half'):
    raw = _Raw(served)
    raw.tell(part)
    raw.close()
  # The states are as if nothing had been.
  after = connection.step(request(SPEC, session, [0, 1], begins=True))
  assert before.version == after.version
  assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(after.state))
  assert served.batcher.error is None


def test_a_session_that_is_not_known_is_a_loss_of_states(served):
  connection = served.connection()
  with pytest.raises(policy_lib.StatesLost):
    connection.step(request(SPEC, 1, [0]))
  session = connection.join('actor 0', 1)
  connection.leave(session)
  connection.leave(session)
  with pytest.raises(policy_lib.StatesLost):
    connection.step(request(SPEC, session, [0]))


def test_a_client_that_is_cut_off_frees_its_states(served):
  connection = served.connection()
  connection.join('actor 0', 3)
  assert served.batcher.environments() == 3
  connection.close()
  deadline = time.monotonic() + inference_servers.LONG
  while served.batcher.environments():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_another_network_is_refused_with_a_word(served):
  other = types.EnvironmentSpec(SPEC.observation, SPEC.num_actions + 1)
  wire = inference_wire.Wire(other, ())
  connection = inference_connection.Connection(served.address, wire)
  with pytest.raises(inference_connection.Refused, match='another network'):
    connection.join('actor 0', 1)


def test_a_full_server_may_be_asked_again(served):
  connection = served.connection()
  session = connection.join('actor 0', 16)
  with pytest.raises(transport.TransportError, match=r'inference\.max_environments'):
    connection.join('actor 1', 1)
  connection.leave(session)
  connection.join('actor 1', 1)


def test_a_server_that_does_not_answer_is_an_error_in_bounded_time(agent, params):
  with inference_servers.serving(
    agent, SPEC, params, deadline=inference_servers.NEVER
  ) as served:
    connection = served.connection(timeout=0.5)
    session = connection.join('actor 0', 1)
    other = served.connection()
    other.join('actor 1', 1)
    with pytest.raises(transport.TransportError, match='timed out'):
      connection.step(request(SPEC, session, [0]))
  with pytest.raises(transport.TransportError, match=r'refused|closed|reset'):
    connection.join('actor 0', 1)


def test_it_ends_while_requests_wait(agent, params):
  with inference_servers.serving(
    agent, SPEC, params, deadline=inference_servers.NEVER
  ) as served:
    connection = served.connection(timeout=inference_servers.LONG)
    session = connection.join('actor 0', 1)
    other = served.connection()
    other.join('actor 1', 1)
    errors = []

    def ask():
      try:
        connection.step(request(SPEC, session, [0]))
      except (policy_lib.StatesLost, transport.TransportError) as e:
        errors.append(e)

    thread = threading.Thread(target=ask)
    thread.start()
    served.stop()
    thread.join(inference_servers.LONG)
    assert len(errors) == 1


def test_it_listens_on_loopback_alone_unless_told(served):
  assert served.server.address.startswith('127.0.0.1:')
  with pytest.raises(OSError, match=str(served.server.port)):
    inference_tcp.Server(served.batcher, served.wire, port=served.server.port)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Keys of two runs."""
  pytest.importorskip('cryptography.x509', reason='no cryptography (latest set)')
  made = [tmp_path_factory.mktemp('run') / 'keys' for _ in range(2)]
  for folder in made:
    run_keys.ensure(folder)
  return made


class TestKeys:
  def test_members_of_the_run_get_in_and_nobody_else(self, agent, params, folders):
    ours, others = folders
    load = run_keys.load
    with inference_servers.serving(
      agent, SPEC, params, keys=load(ours, run_keys.INFERENCE)
    ) as served:
      member = served.connection(keys=load(ours, run_keys.CLIENT))
      session = member.join('actor 0', 1)
      assert member.step(request(SPEC, session, [0])).version == 3
      for keys in (None, load(others, run_keys.CLIENT)):
        stranger = served.connection(keys=keys, timeout=5.0)
        with pytest.raises(transport.TransportError):
          stranger.join('actor 1', 1)

  def test_one_server_does_not_pass_for_another(self, agent, params, folders):
    load, ours = run_keys.load, folders[0]
    client = load(ours, run_keys.CLIENT)
    with inference_servers.serving(
      agent, SPEC, params, keys=load(ours, run_keys.LEARNER)
    ) as served:
      with pytest.raises(transport.TransportError):
        served.connection(keys=client, timeout=5.0).join('actor 0', 1)
      served.stop()
    with inference_servers.serving(
      agent, SPEC, params, keys=load(ours, run_keys.INFERENCE)
    ) as served:
      learner = control_grpc.Client(served.address, timeout=5.0, keys=client)
      with pytest.raises(transport.TransportError):
        learner.fetch(-1)
