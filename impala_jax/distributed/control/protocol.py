"""What the learner and the other processes of a run tell each other.

The learner gives parameters and says when to stop. The others report: totals, which
only grow, so that a lost report loses nothing, gauges of the moment, and events, each
of which is told once. `board` is the learner's side, `grpc` brings it to other
processes; there `wire` judges what arrives.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

from impala_jax import types
from impala_jax.runtime import refusals

Role = Literal['actor', 'evaluator', 'inference', 'learner']


@dataclasses.dataclass(frozen=True)
class Episode:
  """An episode of training has ended, see `environments.base.EpisodeEnd`."""

  task_id: int  # Index of its level.
  episode_return: float  # Raw score.
  length: int  # Agent steps.


@dataclasses.dataclass(frozen=True)
class EnvironmentFailure:
  """An engine is being replaced, see `environments.base.Failure`."""

  actor: int
  env_id: int
  task_id: int
  cause: str


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The levels of a run have been played with the parameters of one version.

  Levels that could not be played are in `failed`, with the reason, and nowhere else.
  """

  time: float  # Unix time, seconds.
  version: int  # Learner updates.
  frames: int
  mean: float  # Of `means`.
  means: dict[str, float]  # Mean return by level.
  scores: dict[str, float]  # Of the suite.
  returns: dict[str, list[float]]  # Of each episode, by level.
  failed: dict[str, str]


Event = Episode | EnvironmentFailure | Evaluation


@dataclasses.dataclass(frozen=True)
class Report:
  """What one process says of itself.

  Attributes:
    role: of the process.
    index: within its role.
    incarnation: changes when the process restarts.
    totals: what it has counted since it started.
    gauges: what holds now, and adds up to nothing over restarts.
    events: since its last report, oldest first.
    left: it is its last.
  """

  role: Role
  index: int
  incarnation: int
  totals: Mapping[str, float]
  gauges: Mapping[str, float] = dataclasses.field(default_factory=dict)
  events: Sequence[Event] = ()
  left: bool = False


class Peer(NamedTuple):
  """A process or thread that has reported."""

  report: Report  # The newest, without its events.
  heard: float  # time.monotonic() of it.


class ParameterSource(Protocol):
  """Where a policy gets parameters from."""

  def fetch(self, have_version: int) -> tuple[int, types.Nest] | None:
    """The newest (version, NumPy parameters), or None where `have_version` is newest.

    A learner that came back from a checkpoint gives a lower version than before.

    Args:
      have_version: what the client has; -1 for nothing.

    Raises:
      transport.TransportError: out of reach (after a bounded wait).
    """


class Client(ParameterSource, Protocol):
  """What actors, evaluators and inference servers have of the control."""

  def report(self, report: Report) -> bool:
    """Takes a report; returns whether the run goes on.

    Raises:
      transport.TransportError: out of reach (after a bounded wait).
    """


class Control(Client, Protocol):
  """What the learner has of it. Thread-safe.

  Attributes:
    identity: another one each time that a learner starts. Versions of different
      learners do not compare: one that came back from a checkpoint begins lower.
    levels: of the run; what events may speak of.
    processes: indices of each role as far as they are known. Of actors others may
      come, of the other roles only these. Empty: of all roles any.
    fetches: how often parameters were given.
    refusals: messages and events that made no sense.
  """

  identity: str
  levels: Sequence[str]
  processes: Mapping[Role, range]
  fetches: int
  refusals: refusals.Refusals

  def publish(self, version: int, copy: Callable[[], types.Nest]) -> None:
    """Offers parameters; `copy` is called, once, when they are first asked for."""

  def stop(self) -> None:
    """From now on every report is answered with the end of the run."""

  def fetch(
    self, have_version: int, of: str | None = None
  ) -> tuple[int, types.Nest] | None:
    """See `ParameterSource`.

    Args:
      have_version: what the client has; -1 for nothing.
      of: `identity` of the learner that `have_version` is of; None for this one.
    """

  def drain_events(self) -> list[Event]:
    """Events reported since the last call, oldest first."""

  def peers(self) -> list[Peer]:
    """Of each (role, index) the newest process."""

  def total(self, role: Role, name: str) -> float:
    """Sum of one of the totals over all processes of a role, past ones included."""
