"""What a run says of itself: every key of a line of `metrics.jsonl`, with its unit.

  python -m impala_jax.reporting.record > docs/metrics.md

makes the table for people.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple

from impala_jax.acting import stages


class Figure(NamedTuple):
  """One number of a record. Its unit is empty where it has none."""

  unit: str
  meaning: str


class Family(NamedTuple):
  """Numbers of a record whose keys are `prefix` and a name.

  Attributes:
    prefix: of the keys.
    members: names that are known.
    name: what others are called, for people; empty where there are none.
    others: what they mean.
  """

  prefix: str
  members: Mapping[str, Figure]
  name: str = ''
  others: Figure = Figure('', '')


def _times(prefix: str, meanings: Mapping[str, str]) -> Family:
  members = {k: Figure('fraction', words) for k, words in meanings.items()}
  return Family(prefix, members)


LEARNER_STAGES = {
  'wait': 'waiting for a batch, or for the other learners to have theirs',
  'update': 'waiting for the device',
  'publish': 'offering parameters',
  'checkpoint': 'beginning a checkpoint',
  'metrics': 'making a record',
  'other': 'in no stage that is measured',
}
METRICS = {
  'total_loss': Figure('', 'what is minimised: the sum of the three losses below'),
  'policy_loss': Figure('', 'sum of -log pi(a) times advantage'),
  'baseline_loss': Figure(
    '', '`loss.baseline_cost` / 2 times the sum of squared errors of the values'
  ),
  'entropy_loss': Figure('nats', '-`loss.entropy_cost` times the sum of entropies'),
  'entropy': Figure('nats', 'mean entropy of the policy'),
  'mean_value': Figure('clipped reward', 'mean of the baseline'),
  'mean_advantage': Figure('clipped reward', 'mean of the V-trace advantage'),
  'mean_rho': Figure('', 'mean of the unclipped ratio pi / mu'),
  'clipped_rho_fraction': Figure('fraction', 'of ratios above `loss.rho_clip`'),
  'kl': Figure('nats', 'estimate of KL(mu, pi) from actions taken; may be below 0'),
  'explained_variance': Figure(
    '', '1 - Var(target - baseline) / Var(target); 0 where all targets agree'
  ),
  'valid_steps': Figure('agent steps', 'transitions of the batch that count'),
  'grad_norm': Figure('', 'of the whole gradient, before clipping'),
  'skipped': Figure(
    'updates', 'skipped in all: loss, gradient or new parameters were not finite'
  ),
}
INFERENCE = {
  'requests_per_second': Figure('requests/s', 'answered'),
  'rows_per_second': Figure('agent steps/s', 'environments in these requests'),
  'batch_mean': Figure('rows', 'of a policy call, padding left out'),
  'padding': Figure('fraction', 'of all rows, which belong to nobody'),
  'wait_ms': Figure('ms', 'of a request, before its policy call'),
  'clients': Figure('actors', 'connected now'),
  'environments': Figure('environments', 'of these'),
  'refused': Figure('requests', 'so far, that made no sense'),
}

ENGINES = {
  'resets': Figure('episodes', 'begun by engines so far'),
  'reset_seconds': Figure('s', 'to begin one, mean since the record before'),
  'cache_hit_rate': Figure('fraction', 'of the maps asked for that a level cache had'),
  'cache_misses': Figure('maps', 'that it had not so far: they were compiled'),
  'cache_evictions': Figure('maps', 'removed again so far, for it was full'),
  'cache_unwritable': Figure('engines', 'so far that could not keep maps in it'),
}

Numbers = dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """One line of `metrics.jsonl`. What is None, or an empty family, is not in it."""

  time: Annotated[float, Figure('s', 'Unix time of the record')]
  wall_seconds: Annotated[float, Figure('s', 'of training, earlier starts included')]
  frames: Annotated[int, Figure('frames', 'trained on in all, action repeats counted')]
  updates: Annotated[int, Figure('updates', 'in all, skipped ones included')]
  frames_per_second: Annotated[
    float,
    Figure(
      'frames/s',
      'over the newest updates: four at least, and `learner.metrics_interval` seconds',
    ),
  ]
  agent_steps_per_second: Annotated[
    float, Figure('agent steps/s', 'the same without action repeats')
  ]
  learning_rate: Annotated[float, Figure('', 'of the next update')]
  policy_lag_mean: Annotated[
    float,
    Figure(
      'updates',
      'that the parameters were behind as they acted, mean',
    ),
  ]
  policy_lag_max: Annotated[int, Figure('updates', 'the same of the oldest unroll')]
  queue_fill: Annotated[float, Figure('fraction', 'of the queue in use')]
  unrolls_received: Annotated[int, Figure('unrolls', 'sound, new, put into a batch')]
  unrolls_corrupted: Annotated[
    int, Figure('unrolls', 'refused by checksum or layout; most are lost, too')
  ]
  unrolls_refused: Annotated[
    int,
    Figure(
      'unrolls',
      'of numbers that no actor can have meant: NaN, actions that there are not, '
      'versions of the future, sequence numbers that jump',
    ),
  ]
  unrolls_lost: Annotated[
    int, Figure('unrolls', 'that never came, by their sequence numbers')
  ]
  unrolls_duplicated: Annotated[int, Figure('unrolls', 'that came again')]
  unrolls_stale: Annotated[
    int, Figure('unrolls', 'older than `learner.max_policy_lag` allows')
  ]
  unrolls_dropped: Annotated[
    int, Figure('unrolls', 'unfinished, whose engine or inference server has gone')
  ]
  environment_failures: Annotated[int, Figure('engines', 'that were replaced')]
  environments_given_up: Annotated[
    int,
    Figure(
      'environments',
      'whose engines failed too often: they play another level now, or none',
    ),
  ]
  levels_lost: Annotated[
    int, Figure('levels', 'that no environment plays any more; means are without them')
  ]
  parameter_fetches: Annotated[int, Figure('fetches', 'that gave newer parameters')]
  reports_refused: Annotated[
    int, Figure('reports', 'by other processes, or events in such, that made no sense')
  ]
  episodes: Annotated[int, Figure('episodes', 'of training, earlier starts included')]
  episode_return: Annotated[
    float | None,
    Figure('raw score', 'in training: mean of the last 100 episodes of each level'),
  ]
  episode_length: Annotated[float | None, Figure('agent steps', 'of the same')]
  level_returns: Annotated[
    Numbers,
    Family(
      'episode_return/', {}, 'level', Figure('raw score', 'the same of one of several')
    ),
  ]
  scores: Annotated[
    Numbers,
    Family(
      'score/', {}, 'name', Figure('score', 'that the suite makes of these returns')
    ),
  ]
  evaluation_return: Annotated[
    float | None, Figure('raw score', 'of the last evaluation, mean over levels')
  ]
  evaluation_scores: Annotated[
    Numbers,
    Family('evaluation_score/', {}, 'name', Figure('score', "the suite's of the same")),
  ]
  evaluation_level_returns: Annotated[
    Numbers,
    Family(
      'evaluation_return/',
      {},
      'level',
      Figure('raw score', 'the same of one of several'),
    ),
  ]
  metrics: Annotated[
    Numbers,
    Family(
      '', METRICS, 'name', Figure('', "of a loss of one's own, whatever it returns")
    ),
  ]
  learner_time: Annotated[Numbers, _times('learner_time/', LEARNER_STAGES)]
  actor_time: Annotated[Numbers, _times('actor_time/', stages.STAGES)]
  inference: Annotated[Numbers, Family('inference/', INFERENCE)]
  engines: Annotated[Numbers, Family('engines/', ENGINES)]

  def flat(self) -> Numbers:
    """By the keys of `metrics.jsonl`."""
    out: Numbers = {}
    for name, _, declared in _fields(Record):
      value = getattr(self, name)
      if isinstance(declared, Family):
        out |= {declared.prefix + key: number for key, number in value.items()}
      elif value is not None:
        out[name] = value
    return out


@dataclasses.dataclass(frozen=True)
class Heard:
  """Of a process: `silent_seconds` since its last report."""

  role: str
  index: int
  silent_seconds: float


@dataclasses.dataclass(frozen=True)
class Refused:
  """How many `what` of one sender were refused."""

  what: str
  sender: str
  count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
  """`status.json`: the newest record and what holds now."""

  record: Record
  bottleneck: Annotated[str, Figure('', 'what limits the run, in words')]
  total_frames: Annotated[int, Figure('frames', 'after which training ends')]
  seconds_left: Annotated[
    float | None, Figure('s', 'to go at this pace; null before five updates')
  ]
  environment_steps: Annotated[
    int, Figure('agent steps', 'of all actors, trained on or not')
  ]
  given_up: Annotated[
    list[str], Figure('', 'levels that environments have given up, a line for each')
  ]
  peers: Annotated[
    list[Heard],
    Figure('', 'processes: `role`, `index`, `silent_seconds` since their last report'),
  ]
  refused: Annotated[
    list[Refused],
    Figure(
      '',
      'whose unrolls or reports were refused most, by learner 0: `what`, `sender`, '
      '`count`',
    ),
  ] = dataclasses.field(default_factory=list)

  def besides(self) -> dict[str, Any]:
    """All but the record, as JSON can hold it."""
    out = dataclasses.asdict(self)
    del out['record']
    return out


def find(key: str) -> Figure | None:
  """What a key of `metrics.jsonl` means; None where a loss of one's own brought it."""
  for name, _, declared in _fields(Record):
    if isinstance(declared, Figure):
      if key == name:
        return declared
    elif key.startswith(declared.prefix):
      if (member := key.removeprefix(declared.prefix)) in declared.members:
        return declared.members[member]
      if declared.name and declared.prefix:
        return declared.others
  return None


def document() -> str:
  """`docs/metrics.md`."""
  head = '| key | type | unit | meaning |\n|---|---|---|---|\n'
  return _TEXT.format(
    record=head + '\n'.join(_rows(Record)), status=head + '\n'.join(_rows(Status))
  )


_TEXT = """# What a run says of itself

Made by `python -m impala_jax.reporting.record`; a test holds that it is current.

`metrics.jsonl` has a line, a JSON object, every `learner.metrics_interval` seconds, or
with each update where these take longer, and TensorBoard the same against frames. A
number that is not finite is null; what is not known yet is missing. Where a run goes on
from a checkpoint, what came after that is cut off, into `metrics.cut.jsonl`: frames and
seconds only grow. With several learners a record is of all of them together. Counts
begin anew with the learner, but for those that say otherwise. The times of learner and
actors are fractions of their wall time since the record before, and add up to 1.

{record}

`status.json` is the newest record and besides:

{status}
"""
_TYPES = {'int': 'whole number', 'float': 'number', 'str': 'text', 'list': 'list'}


def _rows(kind: type[Record | Status]) -> Iterator[str]:
  for name, hint, declared in _fields(kind):
    if isinstance(declared, Figure):
      yield _row(name, _TYPES[hint], declared)
      continue
    for member, figure in declared.members.items():
      yield _row(declared.prefix + member, 'number', figure)
    if declared.name:
      yield _row(f'{declared.prefix}<{declared.name}>', 'number', declared.others)


def _row(key: str, kind: str, figure: Figure) -> str:
  return f'| `{key}` | {kind} | {figure.unit} | {figure.meaning} |'


def _fields(kind: type[Record | Status]) -> Iterator[tuple[str, str, Figure | Family]]:
  """Name, type in a word, and declaration of each field that has one."""
  for name, hint in typing.get_type_hints(kind, include_extras=True).items():
    if typing.get_origin(hint) is Annotated:
      plain, declared = typing.get_args(hint)
      kinds = (
        typing.get_args(plain) if type(None) in typing.get_args(plain) else [plain]
      )
      yield name, getattr(kinds[0], '__name__', ''), declared


if __name__ == '__main__':
  print(document(), end='')
