"""Environments that gave up their level, as the actors that are there tell of them."""

from impala_jax import config as config_lib
from impala_jax.distributed.control import protocol
from impala_jax.reporting import given_up

CONFIG = config_lib.override(
  config_lib.Config(), ['environment.levels=a,b,c', 'actor.envs_per_actor=2']
)


def peer(index, left=False, role='actor', **gauges):
  gauges = {
    name.replace('_0', '/0').replace('_2', '/2'): n for name, n in gauges.items()
  }
  return protocol.Peer(protocol.Report(role, index, 0, {}, gauges, left=left), 0.0)


def test_nothing_was_given_up():
  found = given_up.count(CONFIG, [peer(0), peer(1)])
  assert (found.given_up, found.lost) == ({}, frozenset())
  assert found.describe(CONFIG) == []


def test_levels_are_counted_over_the_actors():
  # They play a b, c a, b c.
  first = peer(0, given_up_0=1, instead_2=1)
  found = given_up.count(CONFIG, [first, peer(1), peer(2)])
  assert found.given_up == {0: 1}
  assert found.left == {0: 1}
  assert found.describe(CONFIG) == ['a: given up by 1 environment(s), 1 play it']
  both = [first, peer(1, given_up_0=1), peer(2)]
  found = given_up.count(CONFIG, both)
  assert found.lost == {0}
  assert found.describe(CONFIG) == ['a: given up by 2 environment(s), none plays it']
  # One that starts anew plays it again; one that left plays nothing.
  assert given_up.count(CONFIG, [peer(0), both[1], both[2]]).lost == frozenset()
  assert given_up.count(CONFIG, [peer(0, left=True), both[1]]).lost == {0}
  # At the end of a run all have left.
  first = peer(0, left=True, given_up_0=1)
  assert given_up.count(CONFIG, [first, peer(1, left=True)]).given_up == {0: 1}


def test_what_makes_no_sense_is_no_level():
  odd = protocol.Report('actor', 0, 0, {}, {'given_up/x': 1.0, 'given_up/99': 1.0})
  assert given_up.count(CONFIG, [protocol.Peer(odd, 0.0)]).given_up == {}
