"""From what one unroll and one fetch cost to what a whole fleet of actors needs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

REPORT_INTERVAL = 2.0  # Seconds between reports of an actor.


class Costs(NamedTuple):
  """What `fleet_benchmark` measures.

  Attributes:
    unroll_bytes: of one unroll on its way.
    parameter_bytes: of one version on its way.
    read_ms: CPU of the learner's host for one unroll: server, checks, batch.
    write_ms: CPU of the actor's side for one unroll, sealing included.
    serve_ms: CPU of the learner's host for one fetch of parameters.
    report_ms: CPU of the learner's host for one report of an actor.
    descriptors: of the learner for one actor.
  """

  unroll_bytes: int
  parameter_bytes: int
  read_ms: float
  write_ms: float
  serve_ms: float
  report_ms: float
  descriptors: float


class Window(NamedTuple):
  """What was seen over some time.

  Attributes:
    learner_cores: CPU-seconds a second of the learner's host.
    client_cores: of all clients.
    unrolls: a second.
    fetches: a second.
  """

  learner_cores: float
  client_cores: float
  unrolls: float
  fetches: float


def costs(
  publishing: Window,
  not_publishing: Window,
  silent: Window,
  reports: float,
  unroll_bytes: int,
  parameter_bytes: int,
  descriptors: float,
) -> Costs:
  """What each thing costs, from windows in which ever fewer of them happen.

  Args:
    publishing: unrolls, fetches and reports.
    not_publishing: unrolls and reports.
    silent: reports alone.
    reports: a second, in each of them.
    unroll_bytes: see `Costs`; so are the others.
    parameter_bytes: bytes.
    descriptors: of one client.

  Returns:
    The costs, none below 0. Fetches cost the actors something, too, which is left out.
  """
  quiet = max(not_publishing.unrolls, 1e-9)
  read = (not_publishing.learner_cores - silent.learner_cores) / quiet
  write = (not_publishing.client_cores - silent.client_cores) / quiet
  serving = publishing.learner_cores - silent.learner_cores - read * publishing.unrolls
  serve = serving / max(publishing.fetches, 1e-9)
  report = silent.learner_cores / reports
  ms = lambda seconds: 1e3 * max(seconds, 0.0)
  return Costs(
    unroll_bytes,
    parameter_bytes,
    ms(read),
    ms(write),
    ms(serve),
    ms(report),
    descriptors,
  )


def at_scale(
  costs: Costs,
  frames_per_second: float = 250_000.0,
  actors: int = 500,
  envs_per_actor: int = 4,
  learners: int = 1,
  batch_size: int = 32,
  unroll_length: int = 100,
  action_repeat: int = 4,
  queue_batches: int = 2,
) -> dict[str, float]:
  """What each of several learner hosts must carry, transport and parameters alone.

  An actor fetches once in the time of one unroll of all its environments, if there is
  a newer version. The network's updates are not in it.

  Args:
    costs: measured.
    frames_per_second: of the whole run, action repeats counted.
    actors: processes of the whole run.
    envs_per_actor: environments of each.
    learners: hosts that share actors and batches.
    batch_size: unrolls of an update, over all learners.
    unroll_length: agent steps.
    action_repeat: frames of an agent step.
    queue_batches: capacity of the queues, in batches.

  Returns:
    Figures of one learner, except `actor_cores_for_transport` of all actors.
  """
  unrolls = frames_per_second / (unroll_length * action_repeat)
  versions = unrolls / batch_size
  fetches = min(unrolls / envs_per_actor, actors * versions)
  mine, fetched = unrolls / learners, fetches / learners
  # A blocked writer parks its item on the server, which holds it about twice.
  held = costs.unroll_bytes * (2 * actors + (queue_batches + 4) * batch_size) / learners
  return {
    'actors': actors,
    'learners': learners,
    'unrolls_per_second': mine,
    'unroll_megabytes_per_second': mine * costs.unroll_bytes / 1e6,
    'cores_to_read': mine * costs.read_ms / 1e3,
    'versions_per_second': versions,
    'fetches_per_second': fetched,
    'parameter_megabytes_per_second': fetched * costs.parameter_bytes / 1e6,
    'cores_to_serve_parameters': fetched * costs.serve_ms / 1e3,
    'cores_for_reports': actors / learners / REPORT_INTERVAL * costs.report_ms / 1e3,
    'network_gigabits_per_second': 8e-9
    * (mine * costs.unroll_bytes + fetched * costs.parameter_bytes),
    'descriptors': costs.descriptors * actors / learners,
    'gigabytes_where_all_writers_wait': held / 1e9,
    'actor_cores_for_transport': unrolls * costs.write_ms / 1e3,
  }


def fairness(counts: Sequence[int]) -> dict[str, float]:
  """How evenly something was dealt out.

  Args:
    counts: of each client; at least one client.

  Returns:
    Minimum, median, maximum, the 5th and 95th percentile, and Jain's index: 1 where
    all got the same, 1 / clients where one got all. 1, too, where nobody got any.
  """
  x = np.asarray(counts, np.float64)
  squares = len(x) * np.square(x).sum()
  low, median, high = np.percentile(x, [5, 50, 95])
  return {
    'min': float(x.min()),
    'p5': float(low),
    'median': float(median),
    'p95': float(high),
    'max': float(x.max()),
    'jain_index': float(x.sum() ** 2 / squares) if squares else 1.0,
  }
