"""Which levels have lost environments whose engines failed too often.

Told by the gauges of the actors that are there, so that it is right again when an actor
or the learner starts anew: `given_up/<task>` and `instead/<task>` count environments.
"""

import collections
from collections.abc import Iterable
from typing import NamedTuple

from impala_jax import config as config_lib
from impala_jax.distributed.control import protocol

_GIVEN_UP, _INSTEAD = 'given_up/', 'instead/'


class GivenUp(NamedTuple):
  """Numbers of environments by the index of their level."""

  given_up: dict[int, int]
  left: dict[int, int]  # That still play a level which others gave up.

  @property
  def lost(self) -> frozenset[int]:
    """Levels that no environment plays any more."""
    return frozenset(task for task, count in self.left.items() if count <= 0)

  def describe(self, config: config_lib.Config) -> list[str]:
    """A line for each level."""
    return [
      f'{config.environment.levels[task]}: given up by {count} environment(s), '
      + (f'{self.left[task]} play it' if task not in self.lost else 'none plays it')
      for task, count in sorted(self.given_up.items())
    ]


def count(config: config_lib.Config, peers: Iterable[protocol.Peer]) -> GivenUp:
  """What the actors among `peers` say."""
  levels, envs = len(config.environment.levels), config.actor.envs_per_actor
  actors = [p.report for p in peers if p.report.role == 'actor']
  # Those who left play nothing, unless all have: then the run has ended.
  reports = [r for r in actors if not r.left] or actors
  given_up = collections.Counter[int]()
  left = collections.Counter[int]()
  for report in reports:
    for task in range(levels):
      gone = int(report.gauges.get(f'{_GIVEN_UP}{task}', 0))
      given_up[task] += gone
      left[task] += int(report.gauges.get(f'{_INSTEAD}{task}', 0)) - gone
  affected = {task for task, number in given_up.items() if number}
  if affected:
    for report in reports:
      # As `registry.make_vector` deals them.
      start = report.index * envs
      left.update((start + j) % levels for j in range(envs))
  return GivenUp(
    {task: given_up[task] for task in affected}, {task: left[task] for task in affected}
  )
