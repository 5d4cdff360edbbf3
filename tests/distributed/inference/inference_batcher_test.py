"""Batches of an inference server: when they run, how large, whose states they use."""

import concurrent.futures

import jax
import numpy as np
import pytest

from impala_jax import types
from impala_jax.distributed.inference import batcher as inference_batcher
from impala_jax.distributed.inference import sessions as inference_sessions
from impala_jax.distributed.inference import wire as inference_wire
from tests import synthetic
from tests.distributed.inference import inference_servers
from tests.distributed.inference.inference_servers import AT_ONCE, NEVER, request

SPEC = types.EnvironmentSpec(types.ArraySpec((2,), np.dtype(np.int32)), 5)


def _counting_agent():
  """Its log-probability is how often it has seen the environment since a FIRST step.

  States begin at 100, so that one which was not set anew shows.
  """
  import jax.numpy as jnp

  from impala_jax.agents import agent as agent_lib

  def step(params, key, timestep, last_action, state):
    first = timestep.step_type == types.StepType.FIRST
    count = jnp.where(first, 0, state['count']) + 1
    logits = jnp.zeros((len(count), 5)) + timestep.observation[:, :1]
    return agent_lib.AgentStep(
      timestep.observation[:, 0] % 5,
      count.astype(jnp.float32) + params['zero'],
      logits,
      count,
      {'count': count},
    )

  initial = lambda b: {'count': jnp.full(b, 100, jnp.int32)}
  return agent_lib.Agent(lambda key: {}, initial, None, step, step)


@pytest.fixture
def serving():
  made = []

  def make(**settings):
    served = inference_servers.Served(
      _counting_agent(), SPEC, {'zero': np.float32(0)}, **settings
    )
    made.append(served)
    return served.batcher

  yield make
  for served in made:
    served.stop()


def _answer(future):
  return future.result(inference_servers.LONG)


def test_sizes_are_few_and_end_with_the_largest():
  assert inference_batcher.batch_sizes(256) == [32, 64, 128, 256]
  assert inference_batcher.batch_sizes(5) == [1, 2, 3, 5]
  assert inference_batcher.batch_sizes(1) == [1]


def test_a_batch_runs_when_it_is_full(serving):
  batcher = serving(deadline=NEVER, max_batch=4)
  clients = [batcher.join(f'actor {i}', 2) for i in range(3)]
  first = batcher.submit(request(SPEC, clients[0], [0, 1]))
  with pytest.raises(concurrent.futures.TimeoutError):
    first.result(0.3)
  assert batcher.totals().batches == 0
  second = batcher.submit(request(SPEC, clients[1], [1, 0]))
  assert _answer(first).action.tolist() == [0, 1]
  assert _answer(second).action.tolist() == [1, 0]
  totals = batcher.totals()
  assert (totals.batches, totals.requests, totals.rows, totals.padding) == (1, 2, 4, 0)


def test_the_oldest_waits_no_longer_than_the_deadline(serving):
  batcher = serving(deadline=0.05, max_batch=8)
  clients = [batcher.join(f'actor {i}', 2) for i in range(2)]
  # The other client says nothing, and the batch is not full.
  assert _answer(batcher.submit(request(SPEC, clients[0], [1]))).action.tolist() == [1]
  assert batcher.totals().waited >= 0.05


def test_nobody_waits_for_clients_that_all_wait(serving):
  batcher = serving(deadline=NEVER, max_batch=8)
  clients = [batcher.join(f'actor {i}', 1) for i in range(3)]
  answers = [batcher.submit(request(SPEC, c, [0])) for c in clients]
  for answer in answers:
    _answer(answer)
  # One that leaves is not waited for either.
  answers = [batcher.submit(request(SPEC, c, [0])) for c in clients[:2]]
  batcher.leave(clients[2])
  for answer in answers:
    _answer(answer)
  totals = batcher.totals()
  assert (totals.batches, totals.rows) == (2, 5)


def test_more_than_fits_waits_for_the_next_batch(serving):
  batcher = serving(deadline=NEVER, max_batch=4)
  clients = [batcher.join(f'actor {i}', 3) for i in range(2)]
  answers = [batcher.submit(request(SPEC, c, [0, 1, 2])) for c in clients]
  assert _answer(answers[0]).action.tolist() == [0, 1, 2]
  # The second is left over, and nobody else is there to wait for.
  batcher.leave(clients[0])
  assert _answer(answers[1]).action.tolist() == [0, 1, 2]
  totals = batcher.totals()
  assert (totals.batches, totals.rows, totals.padding) == (2, 6, 2)


def test_padding_changes_nothing_of_those_that_are_there(serving):
  batcher = serving(deadline=AT_ONCE, max_batch=8, room=3)
  session = batcher.join('actor 0', 3)  # No state is spare but the padding's own.
  _answer(batcher.submit(request(SPEC, session, [0, 1, 2], first=True)))
  for n in range(2, 6):
    decision = _answer(batcher.submit(request(SPEC, session, [1], begins=True)))
    assert decision.log_prob.tolist() == [n]
    assert decision.state['count'].tolist() == [n - 1]
  decision = _answer(batcher.submit(request(SPEC, session, [2, 0], begins=True)))
  assert decision.log_prob.tolist() == [2, 2]
  totals = batcher.totals()
  assert totals.padding == 4 - 3 + 0 + 0  # Of sizes 1, 2, 4 and 8.


def test_states_come_back_for_those_that_begin_alone(serving):
  batcher = serving(deadline=AT_ONCE)
  session = batcher.join('actor 0', 3)
  asked = request(SPEC, session, [2, 0, 1], first=True)
  asked = asked._replace(begins=np.array([False, True, True]))
  assert _answer(batcher.submit(asked)).state['count'].tolist() == [100, 100]
  assert _answer(batcher.submit(request(SPEC, session, [0]))).state is None


def test_one_that_leaves_frees_its_states_and_the_next_begins_anew(serving):
  batcher = serving(deadline=AT_ONCE, room=4)
  session = batcher.join('actor 0', 4)
  _answer(batcher.submit(request(SPEC, session, [0, 1, 2, 3])))
  with pytest.raises(inference_sessions.NoRoom, match='0 of 4'):
    batcher.join('actor 1', 1)
  batcher.leave(session)
  assert (batcher.clients(), batcher.environments()) == (0, 0)
  other = batcher.join('actor 1', 4)
  decision = _answer(batcher.submit(request(SPEC, other, [3, 0], begins=True)))
  assert decision.state['count'].tolist() == [100, 100]
  with pytest.raises(inference_sessions.UnknownSession):
    batcher.submit(request(SPEC, session, [0]))
  batcher.leave(session)  # No error.


def test_a_client_that_comes_again_takes_the_place_of_itself(serving):
  batcher = serving(deadline=NEVER, room=4)
  other = batcher.join('actor 1', 1)
  session = batcher.join('actor 0', 3)
  waiting = batcher.submit(request(SPEC, session, [0]))
  again = batcher.join('actor 0', 3)
  with pytest.raises(inference_sessions.UnknownSession):
    _answer(waiting)
  # Also where nobody waits for the answer any more.
  assert batcher.submit(request(SPEC, again, [0])).cancel()
  again = batcher.join('actor 0', 3)
  assert batcher.environments() == 4
  answers = [batcher.submit(request(SPEC, s, [0])) for s in (again, other)]
  for answer in answers:
    assert _answer(answer).log_prob.tolist() == [101]


def test_one_that_leaves_while_it_is_run_does_not_spoil_the_next(serving, monkeypatch):
  batcher = serving(deadline=AT_ONCE, room=1)
  session = batcher.join('actor 0', 1)
  start, others = batcher._start, []

  def meanwhile(batch):
    if not others:
      batcher.leave(session)
      others.append(batcher.join('actor 1', 1))
    return start(batch)

  monkeypatch.setattr(batcher, '_start', meanwhile)
  _answer(batcher.submit(request(SPEC, session, [0])))
  decision = _answer(batcher.submit(request(SPEC, others[0], [0], begins=True)))
  assert decision.state['count'].tolist() == [100]


def test_room_of_the_silent_is_given_to_others(serving, monkeypatch):
  batcher = serving(room=2)
  session = batcher.join('actor 0', 2)
  monkeypatch.setattr(inference_sessions, 'SILENT', -1.0)
  batcher.join('actor 1', 1)
  with pytest.raises(inference_sessions.UnknownSession):
    batcher.submit(request(SPEC, session, [0]))


def test_what_makes_no_sense_is_refused(serving):
  batcher = serving(deadline=NEVER, max_batch=4)
  session, _ = batcher.join('actor 0', 3), batcher.join('actor 1', 1)
  for ids, words in (
    ([3], 'there are 3'),
    ([-1], 'there are 3'),
  ):
    with pytest.raises(inference_wire.WireError, match=words):
      batcher.submit(request(SPEC, session, ids))
  waiting = batcher.submit(request(SPEC, session, [0]))
  with pytest.raises(inference_wire.WireError, match='under way'):
    batcher.submit(request(SPEC, session, [1]))
  for count in (0, 17):
    with pytest.raises(ValueError, match='room for 16'):
      batcher.join('actor 2', count)
  batcher.close()
  with pytest.raises(inference_sessions.UnknownSession):
    _answer(waiting)
  with pytest.raises(inference_sessions.UnknownSession):
    batcher.submit(request(SPEC, session, [0]))


def test_an_error_of_the_device_ends_it_and_is_kept(serving, monkeypatch):
  batcher = serving(deadline=AT_ONCE)
  session = batcher.join('actor 0', 1)

  def fails(*_):
    raise RuntimeError('out of memory')

  monkeypatch.setattr(batcher._policy, 'start', fails)
  with pytest.raises(inference_sessions.UnknownSession):
    _answer(batcher.submit(request(SPEC, session, [0])))
  batcher.close()
  assert str(batcher.error) == 'out of memory'


def test_new_parameters_act_from_the_next_call_on():
  agent = synthetic.agent()
  params = [agent.init(jax.random.key(i)) for i in range(2)]
  with inference_servers.serving(agent, synthetic.SPEC, params[0]) as served:
    session = served.batcher.join('actor 0', 2)
    ask = lambda: _answer(
      served.batcher.submit(request(synthetic.SPEC, session, [1], first=True))
    )
    before = ask()
    served.policy.set_parameters(9, params[1])
    after = ask()
  assert (before.version, after.version) == (3, 9)
  assert not np.allclose(before.logits, after.logits)


def test_nothing_is_compiled_once_it_serves():
  agent = synthetic.agent()
  params = agent.init(jax.random.key(0))
  compiled = []
  listening = True

  def listen(event, duration, **kwargs):
    if listening and event == '/jax/core/compile/backend_compile_duration':
      compiled.append(event)

  jax.clear_caches()
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    with inference_servers.serving(
      agent, synthetic.SPEC, params, max_batch=16, room=40
    ) as served:
      assert compiled, 'the listener heard of no compilation at all'
      compiled.clear()
      for client in range(2):  # The second takes the states of the first.
        session = served.batcher.join('actor 0', 40)
        for count in range(1, 17):
          ids = list(range(count))
          asked = request(synthetic.SPEC, session, ids, first=client == 0)
          _answer(served.batcher.submit(asked))
          begins = np.arange(count) % (client + 2) == 0
          _answer(served.batcher.submit(asked._replace(begins=begins)))
      served.policy.set_parameters(4, jax.tree.map(np.asarray, params))
      _answer(served.batcher.submit(request(synthetic.SPEC, session, [39], True)))
      assert not compiled
  finally:
    listening = False
