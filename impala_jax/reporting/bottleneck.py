"""Says in words which stage of a run limits it."""

from collections.abc import Mapping, Sequence

from impala_jax.acting import stages

_SILENT = 15.0  # Seconds without a report, of which there is one every two.


def describe(
  learner: Mapping[str, float],
  actor: Mapping[str, float],
  queue_fill: float,
  remote: bool = False,
  silent: Sequence[tuple[str, float]] = (),
  idle: float = 0.0,
) -> str:
  """One sentence on the bottleneck.

  Args:
    learner: shares of the learner's wall time by stage (`wait`: for a batch,
      `update`: for the device, and others).
    actor: shares of the actors' time by stage; empty before the first report.
    queue_fill: fraction of the queue in use.
    remote: whether inference servers run the actors' policy.
    silent: names of actors and servers, and seconds since each one's last report.
    idle: seconds since the last update began.
  """
  lost = sorted((x for x in silent if x[1] >= _SILENT), key=lambda x: -x[1])
  if lost:
    named = ', '.join(f'{name} for {seconds:.0f} s' for name, seconds in lost[:3])
    more = f' and {len(lost) - 3} more' if len(lost) > 3 else ''
    remark = f'not heard of: {named}{more}'
    actors = [x for x in silent if x[0].startswith('actor')]
    if actors and all(x in lost for x in actors):
      return f'no actor is left that reports: {remark}'
    if idle >= _SILENT:
      return f'no update for {idle:.0f} s: {remark}'
    words = describe(learner, actor, queue_fill, remote)
    return f'{words}; {remark}'
  waiting = learner.get('wait', 0.0)
  updating = learner.get('update', 0.0)
  held = actor.get('learner', 0.0)
  if not actor:
    return 'starting: no actor has reported yet'
  own = {k: v for k, v in actor.items() if k != 'learner'}
  main = max(own, key=lambda k: own[k])
  words = stages.STAGES[main]
  if remote and main == 'inference':
    words = 'waiting for the inference servers'
  doing = f'{words} ({own[main]:.0%} of their time)'
  if waiting > 0.4 and waiting >= held:
    return (
      f'the actors: the learner waits {waiting:.0%} of its time for unrolls; '
      f'the actors are mostly {doing}'
    )
  if held > 0.2:
    return (
      f'the learner: it updates {updating:.0%} of its time, and a full queue '
      f'holds the actors back {held:.0%} of theirs'
    )
  return (
    f'balanced: the learner waits {waiting:.0%}, the actors are held back '
    f'{held:.0%}, the queue is {queue_fill:.0%} full'
  )


def nothing_taken(seconds: float, refused: Mapping[str, int], senders: str) -> str:
  """One sentence where unrolls come, but none that is taken.

  Args:
    seconds: since the last one that was.
    refused: how many came since, by why they were not.
    senders: most of them, in words.
  """
  why = ', '.join(f'{count} {words}' for words, count in refused.items() if count)
  of = f' (refused so far: {senders})' if senders else ''
  return (
    f'what comes is refused: no unroll was taken for {seconds:.0f} s, in which came '
    f'{why}{of}'
  )
