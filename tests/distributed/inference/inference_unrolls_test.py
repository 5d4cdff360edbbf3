"""The same unrolls, whether an actor's policy is its own or that of a server."""

import collections
import contextlib
import threading

import jax
import numpy as np
import pytest

from impala_jax import components, configs
from impala_jax import config as config_lib
from impala_jax.acting import actor as actor_lib
from impala_jax.distributed.inference import remote as remote_policy
from impala_jax.distributed.transport import local as local_transport
from impala_jax.distributed.transport import protocol as transport
from impala_jax.environments import vector
from tests import actors, counting
from tests.acting import actor_test
from tests.distributed.inference import inference_servers

_ENVS, _UNROLLS = 6, 36


class _Constant:
  """Parameters of one version."""

  def __init__(self, params, version=3):
    self._newest = (version, params)

  def fetch(self, have_version):
    return self._newest if have_version < self._newest[0] else None


def _parts(*settings):
  return components.build(
    config_lib.override(
      configs.get('catch'),
      [
        f'actor.envs_per_actor={_ENVS}',
        'network.lstm=8',
        'actor.send_logits=true',
        'network.last_action_reward=true',
        *settings,
      ],
    )
  )


def _rows(parts, policy, index=0):
  """All unrolls of an actor, sorted by sequence number."""
  queue = local_transport.LocalTransport(parts.layout, _UNROLLS, _UNROLLS + _ENVS)
  environment = parts.make_environments(index)
  actor = actor_lib.Actor(
    policy,
    environment,
    parts.layout,
    queue.writer(),
    unroll_length=parts.config.actor.unroll_length,
    seed=5,
    send_logits=True,
  )
  actor._rows[:] = 0  # What nothing is written to is the same, too.
  with contextlib.closing(environment), contextlib.closing(queue):
    actor.run(max_unrolls=_UNROLLS)
    rows = queue.read(timeout=30).rows
    return rows[np.argsort(parts.layout.header(rows)['sequence'])]


def _local(parts, params, **settings):
  made = actors.make(
    parts.agent,
    parts.make_environments(0),
    parts.layout,
    None,
    _Constant(params),
    unroll_length=parts.config.actor.unroll_length,
    **settings,
  )
  return made._policy


@pytest.mark.parametrize('batch', [0, 4])
def test_with_one_client_sampled_unrolls_are_the_same_bytes(batch):
  """Same seed, parameters, environments and shape of the policy call."""
  parts = _parts(f'actor.inference_batch={batch}')
  params = jax.tree.map(np.asarray, parts.agent.init(jax.random.key(1)))
  own = _rows(parts, _local(parts, params, inference_batch=batch, seed=5))
  sizes = [batch or _ENVS]
  with (
    inference_servers.serving(
      parts.agent, parts.spec, params, seed=5, sizes=sizes, room=_ENVS
    ) as served,
    contextlib.closing(served.remote('actor 0', _ENVS)) as remote,
  ):
    served_rows = _rows(parts, remote)
    assert remote.version == 3
  np.testing.assert_array_equal(own, served_rows)
  unrolls = parts.layout.views(own)
  # It was worth comparing: actions differ, states are not those of the beginning.
  assert len(np.unique(unrolls.action)) == 3
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(unrolls.agent_state))
  assert (parts.layout.header(own)['version'] == 3).all()


def test_with_several_clients_greedy_unrolls_are_the_same():
  """Batches of any composition; only rounding may differ between their sizes."""
  parts = _parts()
  params = jax.tree.map(np.asarray, parts.agent.init(jax.random.key(1)))
  count = 3
  own = [
    _rows(parts, _local(parts, params, greedy=True), index) for index in range(count)
  ]
  found = [None] * count
  with inference_servers.serving(
    parts.agent, parts.spec, params, greedy=True, room=count * _ENVS, max_batch=16,
    deadline=0.002,
  ) as served:  # fmt: skip

    def run(index):
      with contextlib.closing(served.remote(f'actor {index}', _ENVS)) as remote:
        found[index] = _rows(parts, remote, index)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(inference_servers.LONG)
    assert served.batcher.clients() == 0
  for ours, theirs in zip(own, found, strict=True):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      parts.layout.views(ours),
      parts.layout.views(theirs),
    )


@pytest.mark.parametrize('inference_batch', [0, 2])
def test_every_number_is_of_its_own_environment(inference_batch):
  """Two actors with counting environments, batched together."""
  spec = vector.SequentialVector(
    [lambda: counting.CountingEnvironment(num_actions=actor_test._ACTIONS)]
  ).spec
  agent, layout = actor_test._counting_agent(), actor_test._layout(spec, logits=True)
  with inference_servers.serving(
    agent, spec, {'version': np.float32(3)}, deadline=0.002
  ) as served:
    threads = []
    for index in range(2):
      target = lambda i=index: _counting_actor(served, layout, i, inference_batch)
      threads.append(_Thread(target))
    for thread in threads:
      thread.end()
    totals = served.batcher.totals()
  assert totals.rows > 0
  assert totals.refused == 0


class _Thread:
  """One whose errors are not lost."""

  def __init__(self, work):
    self._error = None

    def run():
      try:
        work()
      except BaseException as e:
        self._error = e

    self._thread = threading.Thread(target=run, daemon=True)
    self._thread.start()

  def end(self):
    self._thread.join(inference_servers.LONG)
    assert not self._thread.is_alive()
    if self._error is not None:
      raise self._error


def _counting_actor(served, layout, index, inference_batch, unrolls=30):
  made = []

  def make(env_id):
    made.append(
      counting.CountingEnvironment(
        env_id, (3, 5), (False, True), num_actions=actor_test._ACTIONS
      )
    )
    return made[-1]

  count = actor_test._ENVS
  environment = vector.SequentialVector(
    [lambda i=i: make(i) for i in range(count)], max_ready=inference_batch
  )
  queue = local_transport.LocalTransport(layout, unrolls, unrolls + count)
  with contextlib.closing(served.remote(f'actor {index}', count)) as remote:
    actor = actor_lib.Actor(
      remote,
      environment,
      layout,
      queue.writer(),
      unroll_length=actor_test._T,
      actor_id=index,
      send_logits=True,
    )
    actor._rows[:] = 0xEE
    actor.run(max_unrolls=unrolls)
  check_counting(queue.read(timeout=30).rows, layout, made)


def check_counting(rows, layout, environments, gaps=False):
  """That each unroll says exactly what happened.

  Args:
    rows: unrolls, in any order.
    layout: of them.
    environments: by id.
    gaps: whether unrolls may be missing between those of an environment, after which
      its state begins anew.
  """
  by_env = collections.defaultdict(list)
  headers = layout.header(rows)
  for i in np.argsort(headers['sequence']):
    by_env[int(headers[i]['env_id'])].append((headers[i], layout.views(rows[i])))
  for env_id, unrolls in by_env.items():
    taken = {(e, s): a for e, s, a in environments[env_id].actions}
    before = None
    for header, unroll in unrolls:
      actor_test._check_timesteps(environments[env_id], unroll)
      _check_decisions(header, unroll, taken)
      begun = unroll.timestep.observation[0].tolist()
      joined = before is not None and before.timestep.observation[-1].tolist() == begun
      if joined:
        actor_test._check_overlap(before, unroll)
      assert joined or gaps or (before is None and begun == [env_id, 0, 0])
      before = unroll


def _check_decisions(header, unroll, taken):
  """The network's count goes on from the state that the unroll was sent with."""
  count = int(unroll.agent_state['count'])
  for t in range(actor_test._T):
    env_id, episode, s = unroll.timestep.observation[t].tolist()
    count = 1 if s == 0 else count + 1
    assert unroll.action[t] == taken[episode, s] == (count + env_id) % 5
    version, seen = divmod(float(unroll.behaviour_log_prob[t]), 1000.0)
    assert (seen, version) == (count, int(header['version']))
    assert (unroll.behaviour_logits[t] == count).all()


def test_a_server_that_restarts_costs_the_unfinished_unrolls_and_no_more():
  spec = vector.SequentialVector(
    [lambda: counting.CountingEnvironment(num_actions=actor_test._ACTIONS)]
  ).spec
  agent, layout = actor_test._counting_agent(), actor_test._layout(spec, logits=True)
  made = []

  def make(env_id):
    made.append(
      counting.CountingEnvironment(
        env_id, (3, 50), (False, True), num_actions=actor_test._ACTIONS
      )
    )
    return made[-1]

  environment = vector.SequentialVector([lambda i=i: make(i) for i in range(3)])
  queue = local_transport.LocalTransport(layout, 60, 80)
  with (
    inference_servers.serving(agent, spec, {'version': np.float32(3)}) as served,
    contextlib.closing(served.remote('actor 0', 3)) as remote,
  ):
    actor = actor_lib.Actor(
      remote,
      environment,
      layout,
      queue.writer(),
      unroll_length=actor_test._T,
      send_logits=True,
      patience=inference_servers.LONG,
    )
    actor.run(max_unrolls=30)
    # In the middle of unrolls, and of episodes.
    for _ in range(2):
      actor.step()
    begun = int(np.count_nonzero(actor._position))
    assert begun == 3
    served.stop()
    thread = _Thread(lambda: actor.run(max_unrolls=30))
    served.start()
    thread.end()
    assert remote.sessions == 2
  assert actor.unrolls_dropped == begun
  assert actor.unrolls_sent == 60
  rows = queue.read(timeout=30).rows
  assert sorted(layout.header(rows)['sequence'].tolist()) == list(range(60))
  check_counting(rows, layout, made, gaps=True)


def test_another_server_is_asked_until_the_own_one_is_back(monkeypatch):
  monkeypatch.setattr(remote_policy, '_STAY', 0.2)
  monkeypatch.setattr(remote_policy, '_LOOK', 0.0)
  made = []

  def make(env_id):
    made.append(
      counting.CountingEnvironment(
        env_id, (3, 50), (False, True), num_actions=actor_test._ACTIONS
      )
    )
    return made[-1]

  environment = vector.SequentialVector([lambda i=i: make(i) for i in range(3)])
  spec = environment.spec
  agent, layout = actor_test._counting_agent(), actor_test._layout(spec, logits=True)
  queue = local_transport.LocalTransport(layout, 90, 110)
  params = {'version': np.float32(3)}
  with (
    inference_servers.serving(agent, spec, params) as own,
    inference_servers.serving(agent, spec, params) as other,
    contextlib.closing(own.remote('actor 0', 3, other)) as remote,
  ):
    actor = actor_lib.Actor(
      remote,
      environment,
      layout,
      queue.writer(),
      unroll_length=actor_test._T,
      send_logits=True,
      patience=inference_servers.LONG,
    )
    actor.run(max_unrolls=30)
    assert (own.batcher.clients(), other.batcher.clients()) == (1, 0)
    own.stop()
    actor.run(max_unrolls=30)
    assert other.batcher.clients() == 1
    own.start()
    actor.run(max_unrolls=30)
    assert (own.batcher.clients(), other.batcher.clients()) == (1, 0)
    assert remote.sessions == 3
  check_counting(queue.read(timeout=30).rows, layout, made, gaps=True)


def test_an_actor_without_its_server_gives_up_and_says_so():
  spec = vector.SequentialVector(
    [lambda: counting.CountingEnvironment(num_actions=actor_test._ACTIONS)]
  ).spec
  agent, layout = actor_test._counting_agent(), actor_test._layout(spec, logits=False)
  environment = vector.SequentialVector(
    [lambda: counting.CountingEnvironment(num_actions=actor_test._ACTIONS)]
  )
  queue = local_transport.LocalTransport(layout, 1, 40)
  with inference_servers.serving(agent, spec, {'version': np.float32(3)}) as served:
    remote = served.remote('actor 7', 1)
    actor = actor_lib.Actor(
      remote,
      environment,
      layout,
      queue.writer(),
      unroll_length=actor_test._T,
      actor_id=7,
      patience=0.3,
    )
    actor.run(max_unrolls=1)
    address = served.address
    served.stop()
    served.address = address  # As long as nobody writes another.
    words = 'actor 7 has been without its inference server .*' + address
    with pytest.raises(transport.TransportError, match=words):
      actor.run(max_unrolls=2)
