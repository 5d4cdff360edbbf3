"""The arithmetic behind the benchmark of many clients."""

import pytest

from experiments.benchmarks import fleet_arithmetic, fleet_clients

COSTS = fleet_arithmetic.Costs(
  unroll_bytes=2_000_000,
  parameter_bytes=5_000_000,
  read_ms=2.0,
  write_ms=1.0,
  serve_ms=4.0,
  report_ms=0.5,
  descriptors=2.0,
)


def test_the_papers_rate_on_one_learner():
  need = fleet_arithmetic.at_scale(COSTS)
  assert need['unrolls_per_second'] == 625  # 250,000 / (4 x 100).
  assert need['unroll_megabytes_per_second'] == 1250
  assert need['cores_to_read'] == pytest.approx(1.25)
  assert need['actor_cores_for_transport'] == pytest.approx(0.625)
  assert need['versions_per_second'] == pytest.approx(625 / 32)
  # Each of 500 actors sends 1.25 unrolls a second, of 4 environments.
  assert need['fetches_per_second'] == pytest.approx(500 * 1.25 / 4)
  assert need['parameter_megabytes_per_second'] == pytest.approx(781.25)
  assert need['cores_to_serve_parameters'] == pytest.approx(0.625)
  assert need['network_gigabits_per_second'] == pytest.approx(8 * (1.25 + 0.78125))
  assert need['descriptors'] == 1000
  assert need['cores_for_reports'] == pytest.approx(500 / 2 * 0.5e-3)
  # 500 writers with two unrolls each, and six batches.
  assert need['gigabytes_where_all_writers_wait'] == pytest.approx(
    2e-3 * (1000 + 6 * 32)
  )


def test_costs_are_told_apart():
  # 100 unrolls/s of 2 ms, 20 fetches/s of 4 ms, 50 reports/s of 0.5 ms; the clients'
  # side of an unroll 1 ms, of reports 30 ms a second together.
  silent = fleet_arithmetic.Window(0.025, 0.03, 0, 0)
  quiet = fleet_arithmetic.Window(0.2 + 0.025, 0.1 + 0.03, 100, 0)
  busy = fleet_arithmetic.Window(0.18 + 0.08 + 0.025, 0.2, 90, 20)
  found = fleet_arithmetic.costs(busy, quiet, silent, 50, 2_000_000, 5_000_000, 2.0)
  assert found == pytest.approx(COSTS)


def test_costs_lost_in_noise_are_nothing():
  same = fleet_arithmetic.Window(0.1, 0.1, 10, 0)
  found = fleet_arithmetic.costs(same, same, same, 50, 1, 1, 2.0)
  assert found.read_ms == found.write_ms == found.serve_ms == 0


def test_learners_share_all_but_the_actors_cores():
  one = fleet_arithmetic.at_scale(COSTS, actors=1000)
  eight = fleet_arithmetic.at_scale(COSTS, actors=1000, learners=8)
  together = {'actors', 'learners', 'versions_per_second', 'actor_cores_for_transport'}
  for name in one.keys() - together:
    assert eight[name] == pytest.approx(one[name] / 8), name
  for name in together - {'learners'}:
    assert eight[name] == one[name]


def test_nobody_fetches_a_version_twice():
  # Few updates: all fetch each version, once.
  need = fleet_arithmetic.at_scale(
    COSTS, actors=10, envs_per_actor=1, batch_size=6250, frames_per_second=250_000
  )
  assert need['versions_per_second'] == pytest.approx(0.1)
  assert need['fetches_per_second'] == pytest.approx(1.0)


def test_fairness():
  even = fleet_arithmetic.fairness([7] * 100)
  assert even['jain_index'] == pytest.approx(1)
  assert even['min'] == even['median'] == even['max'] == 7
  one = fleet_arithmetic.fairness([0] * 99 + [50])
  assert one['jain_index'] == pytest.approx(0.01)
  assert (one['min'], one['median'], one['max']) == (0, 0, 50)
  half = fleet_arithmetic.fairness([1] * 50 + [0] * 50)
  assert half['jain_index'] == pytest.approx(0.5)
  assert fleet_arithmetic.fairness([0, 0])['jain_index'] == 1


def test_each_client_has_an_address_of_its_own():
  addresses = [fleet_clients.own_address('localhost:81', i) for i in range(130_000)]
  assert len(set(addresses)) == len(addresses)
  for address in addresses[::997]:
    host, port = address.split(':')
    assert port == '81'
    parts = [int(p) for p in host.split('.')]
    assert parts[0] == 127
    assert all(0 <= p < 256 for p in parts)
    assert 0 < parts[3] < 255
