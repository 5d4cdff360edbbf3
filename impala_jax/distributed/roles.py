"""What each process of a run does: learner, actor, evaluator.

A role finds all it needs in the run directory: `config.json`, and `address.json`
once the learner is up. Roles run until the learner says stop, `should_stop` says
so, or the learner has been out of reach for too long; no wait is without an end.
"""

import contextlib
import logging
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

from impala_jax import actor as actor_lib
from impala_jax import checkpointing, components, evaluator, learner_loop, metrics
from impala_jax import config as config_lib
from impala_jax import learner as learner_lib
from impala_jax import policy as policy_lib
from impala_jax.distributed import control as control_lib
from impala_jax.distributed import gang_start, learner_gang, transport
from impala_jax.environments import registry

_START_TIMEOUT = 180.0  # Seconds for environments to come up.
_PATIENCE = 120.0  # Seconds of an actor without its learner, if nothing else is said.
_MISSED_END = 10.0  # Of the evaluator, which then takes the run to have ended.
_GOODBYE_TIMEOUT = 10.0  # Seconds that a learner waits for its clients to leave.


def run_learner(
  parts: components.Components,
  run_dir: pathlib.Path,
  should_stop: Callable[[], bool],
) -> bool:
  """The learner process, or one of several: queue, parameter server and updates.

  Goes on from the newest sound checkpoint of the run directory, if there is one.
  Learner 0 writes metrics and checkpoints; the others report to it.

  Returns:
    Whether the run is whole: all its frames are done.

  Raises:
    learner_gang.GangError: another learner has failed or was told to stop. (Where this
      one fails beside others it ends at once, with its cause.)
  """
  # Before anything asks which devices there are.
  gang = gang_start.join(run_dir, os.environ, should_stop)
  if gang is None:
    return False
  with gang.together():
    loop = _learn(parts, run_dir, gang, should_stop)
    gang.finish()
  logging.info('ended at %d updates, %d frames', loop.updates, loop.frames)
  if gang.stopped_by is not None and not should_stop():
    # Not an end that was asked of this process: it is to be started again.
    raise learner_gang.GangError(f'learner {gang.stopped_by} was told to stop')
  return loop.frames >= parts.config.learner.total_frames


def _learn(
  parts: components.Components,
  run_dir: pathlib.Path,
  gang: learner_gang.Alone,
  should_stop: Callable[[], bool],
) -> learner_loop.LearnerLoop:
  from impala_jax.distributed import endpoints, relayed_control, unroll_counts

  config = parts.config
  first = gang.index == 0
  learner = parts.make_learner()
  resume = _resume(run_dir / 'checkpoints', learner, gang)
  keys = _keys(config, run_dir)
  with contextlib.ExitStack() as stack:
    control: Any = control_lib.Control()
    writer = saver = None
    keep: Callable[[dict[str, Any]], None] = lambda record: None
    if first:
      writer = metrics.MetricsWriter(run_dir)
      stack.callback(writer.close)
      saver = checkpointing.Saver(
        run_dir / 'checkpoints', config.learner.keep_checkpoints
      )
      stack.callback(saver.close)
    else:
      control = relayed_control.RelayedControl(
        gang.index, int(os.environ.get('IMPALA_INCARNATION', '0'))
      )
      keep = control.keep
    reader, addresses = stack.enter_context(
      endpoints.serve(
        parts.layout,
        config.learner.batch_size // gang.count,
        config.queue_capacity // gang.count,
        control,
        endpoints.Place.from_environment(os.environ),
        keys,
        config.transport.open_port,
      )
    )

    def on_record(record: dict[str, Any]) -> None:
      keep(record)
      unroll_counts.write(run_dir, gang.index, control, reader)

    loop = learner_loop.LearnerLoop(
        config, learner, reader, control, writer, saver, resume, on_record,
        should_stop, gang,
    )  # fmt: skip
    # Learner 0 last: its addresses say that all others' can be read.
    if not first:
      metrics.write_json(endpoints.address_path(run_dir, gang.index), addresses)
    gang.gather()
    if first:
      metrics.write_json(
        endpoints.address_path(run_dir, 0), {**addresses, 'learners': gang.count}
      )
    logging.info('serves %s', addresses)
    address = gang.spread(addresses['control'])
    if not first:
      control.relay(endpoints.open_control(address, keys), reader.stats)
    # The first to hear of an error: the others wait for this learner.
    stack.enter_context(gang.together())
    loop.run()
    control.stop()
    # Actors first: what they confirm while the queue goes away means nothing.
    _wait_for_goodbye(control)
    if not first:
      loop.last_record()
      control.end_relay()
    gang.gather()
    if first:
      loop.last_record()
  return loop


def _resume(
  checkpoints: pathlib.Path, learner: learner_lib.Learner, gang: learner_gang.Alone
) -> checkpointing.Checkpoint | None:
  """The checkpoint that all learners go on from: learner 0 chooses."""
  resume = None
  if gang.index == 0:
    resume = checkpointing.latest(checkpoints, learner.template())
  name = gang.spread(resume.path.name if resume else '')
  if gang.index and name:
    resume = checkpointing.load(checkpoints / name, learner.template())
  if resume is not None:
    logging.info('goes on from %s', resume.path)
  return resume


def run_actor(
  parts: components.Components,
  run_dir: pathlib.Path,
  index: int,
  incarnation: int,
  should_stop: Callable[[], bool],
) -> None:
  """An actor process; it follows a learner that restarts or moves.

  Raises:
    transport.TransportError, TimeoutError: the learner, or the inference server, stayed
      away, see `Actor.run`.
    config.ConfigError: there is no device for its policy.
  """
  from impala_jax.distributed import learner_link, learner_way, policies

  way = learner_way.Way(run_dir, index, parts.layout, _keys(parts.config, run_dir))
  link = learner_link.open_link(way, should_stop, writes=True)
  if link is None:
    return
  with contextlib.closing(link):
    policy: policy_lib.Policy
    if parts.config.inference.servers:
      policy = policies.remote(parts, run_dir, index, way.keys)
    else:
      policy = policies.local(parts, link, index, incarnation)
    with contextlib.closing(policy):
      drive_actor(
        parts, link, policy, link, index, incarnation, should_stop,
        learner_way.patience() or _PATIENCE,
      )  # fmt: skip


def drive_actor(
  parts: components.Components,
  writer: transport.Writer,
  policy: policy_lib.Policy,
  control: Any,
  index: int,
  incarnation: int,
  should_stop: Callable[[], bool],
  patience: float = _PATIENCE,
) -> None:
  """Runs one actor and its reports, in a process or a thread of its own.

  The actor gives up after `patience` seconds without its learner, or the inference
  server that is its `policy`.
  """
  config = parts.config
  reporter = control_lib.Reporter(control, 'actor', index, incarnation)
  told_to_stop = False

  def totals() -> dict[str, float]:
    return {
      'agent_steps': actor.agent_steps,
      'unrolls': actor.unrolls_sent,
      'unrolls_dropped': actor.unrolls_dropped,
      'version': actor.version,
      **{f'seconds/{k}': v for k, v in actor.seconds.items()},
    }

  def stop() -> bool:
    nonlocal told_to_stop
    while actor.episodes:
      episode = actor.episodes.popleft()
      reporter.add({
          'kind': 'episode', 'task_id': episode.task_id,
          'return': episode.episode_return, 'length': episode.length,
      })  # fmt: skip
    while actor.failures:
      failure = actor.failures.popleft()
      logging.warning('environment %d: %s', failure.env_id, failure.cause)
      reporter.add({
          'kind': 'environment_failure', 'actor': index, 'env_id': failure.env_id,
          'task_id': failure.task_id, 'cause': failure.cause,
      })  # fmt: skip
    # A report that fails is made again; how long for is the actor's business.
    with contextlib.suppress(transport.TransportError):
      told_to_stop = told_to_stop or not reporter.maybe_report(totals())
    return told_to_stop or should_stop()

  environment = parts.make_environments(index)
  actor = actor_lib.Actor(
      policy, environment, parts.layout, writer,
      unroll_length=config.actor.unroll_length, actor_id=index,
      incarnation=incarnation,
      seed=registry.random_seed(config.seed, index, incarnation),
      send_logits=config.actor.send_logits, should_stop=stop, patience=patience,
      environment_patience=_START_TIMEOUT + 2 * config.environment.reset_timeout,
  )  # fmt: skip
  try:
    actor.run()
  finally:
    environment.close()
    with contextlib.suppress(transport.TransportError):
      reporter.maybe_report({**totals(), 'left': 1}, force=True)


def run_evaluator(
  parts: components.Components,
  run_dir: pathlib.Path,
  incarnation: int,
  should_stop: Callable[[], bool],
) -> None:
  """The evaluator process: every so often in training, and once at its end."""
  from impala_jax.distributed import learner_link, learner_way

  way = learner_way.Way(run_dir, 0, parts.layout, _keys(parts.config, run_dir))
  link = learner_link.open_link(way, should_stop, writes=False)
  if link is None:
    return
  with contextlib.closing(link):
    drive_evaluator(
      parts, run_dir, link, incarnation, should_stop,
      learner_way.patience() or _MISSED_END,
    )  # fmt: skip


def drive_evaluator(
  parts: components.Components,
  run_dir: pathlib.Path,
  control: Any,
  incarnation: int,
  should_stop: Callable[[], bool],
  patience: float = _MISSED_END,
) -> None:
  """Evaluates until the run ends, then writes the last evaluation and a video.

  The run has ended, too, when its learner has been away for `patience` seconds: it
  has written its checkpoint.
  """
  config = parts.config
  reporter = control_lib.Reporter(control, 'evaluator', 0, incarnation, interval=1.0)
  ended = False

  def run_ended() -> bool:
    nonlocal ended
    try:
      ended = ended or not reporter.maybe_report({})
    except transport.TransportError:
      ended = reporter.unheard > patience
    return ended or should_stop()

  session = evaluator.Session(parts, run_dir)
  version = -1
  next_time = time.monotonic() + config.evaluator.interval
  while not run_ended():
    if time.monotonic() < next_time:
      time.sleep(0.2)
      continue
    with contextlib.suppress(transport.TransportError):
      newer = control.fetch(version)
      if newer is not None:
        version, params = newer
        event = session.evaluate(version, params, run_ended)
        if event is not None:
          reporter.add(event)
    next_time = time.monotonic() + config.evaluator.interval
  if not should_stop():
    session.finish(should_stop)


def _keys(config: config_lib.Config, run_dir: pathlib.Path) -> pathlib.Path | None:
  """Where the run's keys are, if it was launched with mutual TLS."""
  return run_dir / 'keys' if config.transport.tls else None


def _wait_for_goodbye(control: control_lib.Control) -> None:
  deadline = time.monotonic() + _GOODBYE_TIMEOUT
  while time.monotonic() < deadline:
    actors = [p for p in control.peers() if p.role == 'actor']
    # An actor that fell silent long ago has crashed and will not say goodbye.
    present = [p for p in actors if not p.totals.get('left')
               and time.monotonic() - p.heard < 5.0]  # fmt: skip
    if not present:
      return
    time.sleep(0.1)
