"""What an actor does when an environment's engine is replaced under it."""

import itertools

import numpy as np
import pytest

from impala_jax import types
from impala_jax.distributed.transport import local as local_transport
from impala_jax.environments import base, concat_vector, vector
from tests import actors, counting
from tests.acting import actor_test

_T = actor_test._T


class _FailingVector(vector.SequentialVector):
  """Now and then an environment loses its engine: it begins anew with FIRST."""

  def __init__(self, factories, probability, seed):
    super().__init__(factories)
    self._rng = np.random.default_rng(seed)
    self._probability = probability
    self.lost = []  # (env_id, the time step that the agent saw last)

  def recv(self, timeout):
    ready = super().recv(timeout)
    restarted, failures = [], []
    for row, i in enumerate(ready.env_ids.tolist()):
      first = ready.timestep.step_type[row] == types.StepType.FIRST
      if not first and self._rng.random() < self._probability:
        self._write(ready.timestep, row, self._environments[i].reset())
        ready.timestep.reward[row], ready.timestep.discount[row] = 0, 1
        restarted.append(i)
        failures.append(base.Failure(i, 0, f'engine {i} died'))
        self.lost.append(i)
    ended = [e for e in ready.episodes if e.env_id not in restarted]
    return ready._replace(episodes=ended, restarted=restarted, failures=failures)


@pytest.mark.parametrize('probability', [0.05, 0.3])
def test_nothing_of_a_lost_episode_is_joined_to_what_follows(probability):
  environment = _FailingVector(
    [
      lambda i=i: counting.CountingEnvironment(i, (9,), num_actions=actor_test._ACTIONS)
      for i in range(3)
    ],
    probability,
    seed=1,
  )
  layout = actor_test._layout(environment.spec, logits=False)
  # Room for all: this test reads when the actor is done.
  queue = local_transport.LocalTransport(layout, batch_size=40, capacity=43)
  actor = actors.make(
    actor_test._counting_agent(),
    environment,
    layout,
    queue.writer(),
    actor_test._Parameters(),
    unroll_length=_T,
  )
  actor.run(max_unrolls=40)
  assert len(environment.lost) > 3
  assert [f.env_id for f in actor.failures] == environment.lost
  assert 0 < actor.unrolls_dropped <= len(environment.lost)

  batch = queue.read(timeout=10)
  for row in batch.rows:
    unroll = layout.views(row)
    seen = [tuple(x) for x in unroll.timestep.observation.tolist()]
    for (env, episode, step), after in itertools.pairwise(seen):
      over = step == 9
      assert after == ((env, episode + 1, 0) if over else (env, episode, step + 1))
    # The recurrent state is of the same episode, too.
    if seen[0][2] > 0:
      assert unroll.agent_state['count'] == seen[0][2]
  sequences = layout.header(batch.rows)['sequence']
  assert sorted(sequences.tolist()) == list(range(40))
  batch.release()
  # Every time step is accounted for: sent, dropped with its unroll, or under way.
  assert actor.agent_steps >= 40 * _T


def test_concat_vector_passes_on_who_failed():
  make = lambda i: _FailingVector(
    [lambda i=i: counting.CountingEnvironment(i, (9,))], 1.0, seed=i
  )
  joined = concat_vector.ConcatVector([make(0), make(1)])
  joined.reset(0)
  ready = joined.recv(1.0)
  assert ready.restarted == []
  joined.send(ready.env_ids, np.zeros(2, np.int32))
  ready = joined.recv(1.0)
  assert ready.restarted == [0, 1]
  assert [f.env_id for f in ready.failures] == [0, 1]
