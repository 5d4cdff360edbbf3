"""The data path with environments and a network that count.

Every number in an unroll says where it came from, so overlap, resets, recurrent
state, versions and the pairing of actions can be checked one by one. The same
checks run over both transports.
"""

import collections
import contextlib
import itertools
import threading
import time
import types as simple
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from impala_jax import types, unroll_layout
from impala_jax.acting import actor as actor_lib
from impala_jax.agents import agent as agent_lib
from impala_jax.distributed.transport import local as local_transport
from impala_jax.distributed.transport import protocol as transport
from impala_jax.distributed.transport import tcp as tcp_transport
from impala_jax.environments import vector
from tests import actors, counting, transports

_T = 4
_ACTIONS = 5
_ENVS = 3
_TASKS = (2, 0, 1)  # Of each environment.
_VERSION_SCALE = 1000.0


def _counting_agent() -> agent_lib.Agent:
  """State: how many steps of the episode it has seen. All else follows from that.

  The action is (count + env_id) % A, the log-probability version * 1000 + count.
  """

  def advance(
    timestep: types.TimeStep, state: dict[str, jax.Array]
  ) -> dict[str, jax.Array]:
    first = timestep.step_type == types.StepType.FIRST
    return {'count': jnp.where(first, 0, state['count']) + 1}

  def step(
    params: Any, key: jax.Array, timestep: types.TimeStep, last_action: Any, state: Any
  ) -> agent_lib.AgentStep:
    new = advance(timestep, state)
    count = new['count']
    action = (count + timestep.observation[:, 0]) % _ACTIONS
    log_prob = params['version'] * _VERSION_SCALE + count
    logits = jnp.broadcast_to(count[:, None].astype(jnp.float32), (*count.shape, 5))
    return agent_lib.AgentStep(action, log_prob, logits, log_prob, new)

  def unroll(*_: Any) -> Any:
    raise NotImplementedError('an actor only steps')

  initial = lambda b: {'count': jnp.zeros(b, jnp.int32)}
  return agent_lib.Agent(lambda key: {}, initial, unroll, step, step)


class _Parameters:
  """A newer version at every call."""

  def __init__(self) -> None:
    self.calls = 0

  def fetch(self, have_version: int) -> tuple[int, types.Nest] | None:
    self.calls += 1
    assert have_version == self.calls - 2
    version = self.calls - 1
    return version, {'version': np.float32(version)}


def _layout(spec: types.EnvironmentSpec, logits: bool) -> unroll_layout.UnrollLayout:
  state = {'count': types.ArraySpec((), np.dtype(np.int32))}
  return unroll_layout.UnrollLayout(
    unroll_layout.unroll_spec(spec, state, _T, with_logits=logits)
  )


@contextlib.contextmanager
def _transport(
  kind: str, layout: unroll_layout.UnrollLayout
) -> Iterator[tuple[Any, transport.Writer]]:
  if kind == 'local':
    queue = local_transport.LocalTransport(layout, batch_size=2, capacity=4)
    yield queue, queue.writer()
    queue.close()
    return
  make_reader, make_writer = tcp_transport.TcpReader, tcp_transport.TcpWriter
  if kind == 'reverb':
    from impala_jax.distributed.transport import reverb as reverb_transport

    make_reader = reverb_transport.ReverbReader
    make_writer = reverb_transport.ReverbWriter
  reader = make_reader(layout, batch_size=2, capacity=4)
  writer = make_writer(reader.address, layout)
  yield reader, writer
  writer.close()
  reader.close()


def _run(
  kind: str, lengths: tuple[int, ...], inference_batch: int, unrolls: int
) -> tuple[dict[int, list[Any]], list[counting.CountingEnvironment], _Parameters]:
  """Unrolls of a whole actor by environment: (header, unroll) in order."""
  made: list[counting.CountingEnvironment] = []

  def make(env_id: int) -> counting.CountingEnvironment:
    environment = counting.CountingEnvironment(
      env_id, lengths, (False, True), num_actions=_ACTIONS
    )
    made.append(environment)
    return environment

  environment = vector.SequentialVector(
    [lambda i=i: make(i) for i in range(_ENVS)],
    task_ids=_TASKS,
    max_ready=inference_batch,
  )
  layout = _layout(environment.spec, logits=True)
  parameters = _Parameters()
  received = collections.defaultdict(list)
  with _transport(kind, layout) as (reader, writer):
    actor = actors.make(
      _counting_agent(),
      environment,
      layout,
      writer,
      parameters,
      unroll_length=_T,
      actor_id=7,
      incarnation=2,
      inference_batch=inference_batch,
      send_logits=True,
    )
    # An unwritten field would show as an impossible value.
    actor._rows[:] = 0xEE
    thread = threading.Thread(target=lambda: actor.run(max_unrolls=unrolls))
    thread.start()
    for _ in range(unrolls // 2):
      batch = reader.read(timeout=30)
      for row in batch.rows:
        header = layout.header(row).copy()
        received[int(header['env_id'])].append(
          (header, jax.tree.map(np.copy, layout.views(row)))
        )
      batch.release()
    thread.join(timeout=30)
    assert not thread.is_alive()
    stats = reader.stats()
    assert (stats.lost, stats.corrupted, stats.duplicated) == (0, 0, 0)
  return received, made, parameters


@pytest.mark.parametrize('kind', transports.ALL)
@pytest.mark.parametrize('inference_batch', [0, 2])
@pytest.mark.parametrize('lengths', [(3, 5), (1, 2, 9)])
def test_unrolls_say_exactly_what_happened(kind, inference_batch, lengths):
  received, environments, _ = _run(kind, lengths, inference_batch, unrolls=30)
  assert sorted(received) == list(range(_ENVS))
  for env_id, unrolls in received.items():
    taken = {(e, s): a for e, s, a in environments[env_id].actions}
    previous = None
    for header, unroll in unrolls:
      assert int(header['actor_id']) == 7
      assert int(header['incarnation']) == 2
      assert int(header['task_id']) == int(unroll.task_id) == _TASKS[env_id]
      _check_timesteps(environments[env_id], unroll)
      _check_decisions(env_id, header, unroll, taken)
      if previous is None:
        assert unroll.timestep.observation[0].tolist() == [env_id, 0, 0]
        assert unroll.agent_state['count'] == 0
      else:
        _check_overlap(previous, unroll)
      previous = unroll


def _check_timesteps(
  environment: counting.CountingEnvironment, unroll: types.Unroll
) -> None:
  step = unroll.timestep
  for t in range(_T + 1):
    _, episode, s = step.observation[t].tolist()
    length = environment.length(episode)
    kind = (
      types.StepType.FIRST
      if s == 0
      else types.StepType.LAST
      if s == length
      else types.StepType.MID
    )
    assert step.step_type[t] == kind
    if s > 0:
      assert step.reward[t] == environment.reward(episode, s)
      ends = s == length and not environment.time_limit(episode)
      assert step.discount[t] == (0.0 if ends else 1.0)
    if t > 0:
      _, episode_before, s_before = step.observation[t - 1].tolist()
      follows = (
        (episode_before + 1, 0)
        if s_before == environment.length(episode_before)
        else (episode_before, s_before + 1)
      )
      assert (episode, s) == follows


def _check_decisions(
  env_id: int, header: np.ndarray, unroll: types.Unroll, taken: dict[Any, int]
) -> None:
  for t in range(_T):
    _, episode, s = unroll.timestep.observation[t].tolist()
    count = s + 1  # Steps of this episode seen, this one included.
    assert unroll.action[t] == taken[episode, s] == (count + env_id) % _ACTIONS
    version, seen = divmod(float(unroll.behaviour_log_prob[t]), _VERSION_SCALE)
    assert seen == count
    assert version >= int(header['version'])
    if t == 0:
      assert version == int(header['version'])
    assert (unroll.behaviour_logits[t] == count).all()
  # The state before step 0 has seen the steps before it; at a FIRST step it still
  # holds the episode before, and the network resets it.
  s = int(unroll.timestep.observation[0][2])
  if s > 0:
    assert unroll.agent_state['count'] == s


def _check_overlap(before: types.Unroll, after: types.Unroll) -> None:
  last = jax.tree.map(lambda x: x[_T], before.timestep)
  first = jax.tree.map(lambda x: x[0], after.timestep)
  jax.tree.map(np.testing.assert_array_equal, last, first)
  assert after.last_action == before.action[_T - 1]


@pytest.mark.parametrize('inference_batch', [0, 2])
def test_parameters_are_fetched_at_most_once_per_unroll(inference_batch):
  received, _, parameters = _run('local', (3, 5), inference_batch, unrolls=30)
  most = max(len(unrolls) for unrolls in received.values())
  assert 2 <= parameters.calls <= most + 2
  versions = [int(h['version']) for h, _ in received[0]]
  assert versions == sorted(versions)
  assert len(set(versions)) > len(versions) // 2


def test_the_seconds_of_stages_add_up_to_those_of_the_run(monkeypatch):
  ticks = itertools.count()
  clock = simple.SimpleNamespace(
    perf_counter=lambda: next(ticks), monotonic=time.monotonic
  )
  monkeypatch.setattr(actor_lib, 'time', clock)
  environment = vector.SequentialVector(
    [
      lambda i=i: counting.CountingEnvironment(
        i, (3, 5), (False,), num_actions=_ACTIONS
      )
      for i in range(_ENVS)
    ],
    task_ids=[0] * _ENVS,
  )
  layout = _layout(environment.spec, logits=False)
  queue = local_transport.LocalTransport(layout, batch_size=4, capacity=64)
  actor = actors.make(
    _counting_agent(),
    environment,
    layout,
    queue.writer(),
    _Parameters(),
    unroll_length=_T,
  )
  actor.run(max_unrolls=6)
  before, start = sum(actor.seconds.values()), next(ticks)
  actor.run(max_unrolls=12)
  # Those of the run itself lie between the two that are read here.
  assert sum(actor.seconds.values()) - before == next(ticks) - start - 2
  assert all(seconds > 0 for name, seconds in actor.seconds.items())
  queue.close()


class _FastLearner:
  """One update with each unroll that is written."""

  def __init__(self, writer):
    self._writer = writer
    self.version = 0

  def write(self, row, timeout):
    self._writer.write(row, timeout)
    self.version += 1

  def fetch(self, have_version):
    if self.version <= have_version:
      return None
    return self.version, {'version': np.float32(self.version)}


@pytest.mark.parametrize('max_lag', [0, 8])
def test_with_a_limit_no_unroll_begins_with_old_parameters(max_lag):
  count = 12
  environment = vector.SequentialVector(
    [
      lambda i=i: counting.CountingEnvironment(i, (7,), num_actions=_ACTIONS)
      for i in range(count)
    ],
    max_ready=1,
  )
  layout = _layout(environment.spec, logits=False)
  queue = local_transport.LocalTransport(layout, batch_size=60, capacity=60)
  learner = _FastLearner(queue.writer())
  actor = actors.make(
    _counting_agent(),
    environment,
    layout,
    learner,
    learner,
    unroll_length=_T,
    max_lag=max_lag,
  )
  actor.run(max_unrolls=60)
  headers = layout.header(queue.read(timeout=30).rows)
  # An unroll begins when the one before of its environment was sent, as number s:
  # then the learner had made s + 1 updates.
  lags = []
  for env_id in range(count):
    sent = [
      (int(h['sequence']), int(h['version'])) for h in headers if h['env_id'] == env_id
    ]
    lags += [s + 1 - v for (s, _), (_, v) in itertools.pairwise(sent)]
  assert len(lags) == 60 - count
  assert min(lags) >= 0
  # A quarter of the limit; without one as many as there are environments.
  assert max(lags) == (2 if max_lag else count - 1)


class _Gone:
  """A learner that is out of reach."""

  def fetch(self, have_version: int) -> tuple[int, types.Nest] | None:
    raise transport.TransportError('learner at nowhere: unavailable')


def test_an_actor_without_its_learner_gives_up_and_says_so():
  environment = vector.SequentialVector(
    [lambda: counting.CountingEnvironment(num_actions=_ACTIONS)]
  )
  layout = _layout(environment.spec, logits=False)
  queue = local_transport.LocalTransport(layout, 1, 1)
  actor = actors.make(
    _counting_agent(),
    environment,
    layout,
    queue.writer(),
    _Gone(),
    unroll_length=_T,
    actor_id=3,
    patience=0.3,
  )
  with pytest.raises(transport.TransportError, match=r'actor 3 .*nowhere'):
    actor.run()


def test_a_stuck_environment_is_an_error_not_a_hang(monkeypatch):
  environment = vector.SequentialVector(
    [lambda: counting.CountingEnvironment(num_actions=_ACTIONS)]
  )
  layout = _layout(environment.spec, logits=False)
  queue = local_transport.LocalTransport(layout, 1, 1)
  actor = actors.make(
    _counting_agent(),
    environment,
    layout,
    queue.writer(),
    _Parameters(),
    unroll_length=_T,
    actor_id=3,
    environment_patience=0.2,
  )

  def stuck(timeout: float) -> None:
    raise TimeoutError('nothing is ready')

  monkeypatch.setattr(environment, 'recv', stuck)
  with pytest.raises(TimeoutError, match='no environment of actor 3'):
    actor.run()


def test_a_full_queue_holds_the_actor_back_until_it_is_stopped():
  environment = vector.SequentialVector(
    [lambda: counting.CountingEnvironment(num_actions=_ACTIONS)]
  )
  layout = _layout(environment.spec, logits=False)
  queue = local_transport.LocalTransport(layout, 2, 2)
  stop = threading.Event()
  actor = actors.make(
    _counting_agent(),
    environment,
    layout,
    queue.writer(),
    _Parameters(),
    unroll_length=_T,
    should_stop=stop.is_set,
  )
  thread = threading.Thread(target=actor.run)
  thread.start()
  for _ in range(3000):
    if actor.unrolls_sent == 2:
      break
    stop.wait(0.01)
  stop.wait(1.5)  # Longer than one try to write.
  assert actor.unrolls_sent == 2
  assert thread.is_alive()
  stop.set()
  thread.join(timeout=10)
  assert not thread.is_alive()


def test_a_learner_that_takes_nothing_is_an_error_in_the_end():
  environment = vector.SequentialVector(
    [lambda: counting.CountingEnvironment(num_actions=_ACTIONS)]
  )
  layout = _layout(environment.spec, logits=False)
  queue = local_transport.LocalTransport(layout, 2, 2)
  actor = actors.make(
    _counting_agent(),
    environment,
    layout,
    queue.writer(),
    _Parameters(),
    unroll_length=_T,
    actor_id=3,
    patience=0.1,
  )
  with pytest.raises(TimeoutError, match='actor 3: the queue has been full'):
    actor.run()
