"""The actors of a run: none plays or draws what another does."""

import itertools

import jax
import numpy as np
import pytest

from impala_jax import components, config, configs, types
from impala_jax.distributed.control import board
from impala_jax.distributed.roles import actor as actor_role
from impala_jax.distributed.roles import policies

_ENVS = 16
# (run's seed, index, incarnation) of actors that must differ.
_ACTORS = ((1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0))


class _Unrolls:
  """A way to a learner that keeps what is written."""

  def __init__(self):
    self.rows = []

  def write(self, row, timeout):
    del timeout
    self.rows.append(row.copy())

  def close(self):
    pass


class _Fixed:
  def __init__(self, params):
    self._params = params

  def fetch(self, have_version):
    return (0, self._params) if have_version < 0 else None


@pytest.fixture(scope='module')
def build():
  base = configs.get('catch')
  made = {
    seed: components.build(
      config.override(base, [f'seed={seed}', f'actor.envs_per_actor={_ENVS}'])
    )
    for seed in (1, 2)
  }
  # One agent, so that its policy call is compiled once.
  agent = made[1].agent
  source = _Fixed(agent.init(jax.random.key(0)))
  return lambda seed: (made[seed]._replace(agent=agent), source)


def _policy(build, seed, index, incarnation):
  parts, source = build(seed)
  return parts, policies.local(parts, source, index, incarnation)


def _games(build, seed, index, incarnation):
  """First boards of an actor's environments."""
  parts, policy = _policy(build, seed, index, incarnation)
  unrolls = _Unrolls()
  actor_role.drive(
    parts,
    unrolls,
    policy,
    board.Board(),
    index,
    incarnation,
    should_stop=lambda: len(unrolls.rows) >= _ENVS,
  )
  headers = parts.layout.header(np.stack(unrolls.rows))
  assert set(headers['actor_id']) == {index}
  assert set(headers['incarnation']) == {incarnation}
  order = np.argsort(headers['env_id'][:_ENVS])
  boards = parts.layout.views(np.stack(unrolls.rows)).timestep.observation[:_ENVS, 0]
  return boards[order]


def _draws(build, seed, index, incarnation):
  """An actor's actions, given always the same boards."""
  parts, policy = _policy(build, seed, index, incarnation)
  timestep = types.TimeStep(
    np.zeros(_ENVS, np.uint8),
    np.zeros(_ENVS, np.float32),
    np.ones(_ENVS, np.float32),
    np.zeros((_ENVS, *parts.spec.observation.shape), np.float32),
  )
  policy.renew()
  ids, nobody = np.arange(_ENVS, dtype=np.int32), np.zeros(_ENVS, bool)
  actions = [
    policy.act(ids, timestep, np.zeros(_ENVS, np.int32), nobody).action
    for _ in range(3)
  ]
  return np.stack(actions)


@pytest.mark.parametrize('what', [_games, _draws])
def test_actors_runs_and_restarts_differ(build, what):
  found = [what(build, *actor) for actor in _ACTORS]
  for a, b in itertools.combinations(found, 2):
    assert (a != b).any()
  np.testing.assert_array_equal(found[1], what(build, *_ACTORS[1]))
