"""What each process of a run does: learner, actor, evaluator.

A role finds all it needs in the run directory: `config.json`, and `address.json`
once the learner is up. Roles run until the learner says stop, `should_stop` says
so, or the learner has been out of reach for too long; no wait is without an end.
"""

import contextlib
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from impala_jax import actor as actor_lib
from impala_jax import checkpointing, components, evaluator, learner_loop, metrics
from impala_jax import config as config_lib
from impala_jax.distributed import control as control_lib
from impala_jax.distributed import transport
from impala_jax.environments import registry

_START_TIMEOUT = 180.0  # Seconds for a learner to come up.
_GOODBYE_TIMEOUT = 10.0  # Seconds that a learner waits for its clients to leave.


def run_learner(
  parts: components.Components,
  run_dir: pathlib.Path,
  should_stop: Callable[[], bool],
) -> None:
  """The learner process: queue, parameter server and updates.

  Goes on from the newest sound checkpoint of the run directory, if there is one.
  """
  from impala_jax.distributed import endpoints

  config = parts.config
  learner = parts.make_learner()
  checkpoints = run_dir / 'checkpoints'
  resume = checkpointing.latest(checkpoints, learner.template())
  if resume is not None:
    logging.info('goes on from %s', resume.path)
  control = control_lib.Control()
  with contextlib.ExitStack() as stack:
    reader, addresses = stack.enter_context(
      endpoints.serve(
        parts.layout,
        config.learner.batch_size,
        config.queue_capacity,
        control,
        endpoints.Place.from_environment(os.environ),
        _keys(parts.config, run_dir),
        config.transport.open_port,
      )
    )
    writer = metrics.MetricsWriter(run_dir)
    stack.callback(writer.close)
    saver = checkpointing.Saver(checkpoints, config.learner.keep_checkpoints)
    stack.callback(saver.close)
    loop = learner_loop.LearnerLoop(
        config, learner, reader, control, writer, saver, resume,
        should_stop=should_stop,
    )  # fmt: skip
    metrics.write_json(run_dir / 'address.json', addresses)
    logging.info('serves %s', addresses)
    loop.run()
    control.stop()
    # Actors first: what they confirm while the queue goes away means nothing.
    _wait_for_goodbye(control)
    loop.last_record()
  logging.info('ended at %d updates, %d frames', loop.updates, loop.frames)


def run_actor(
  parts: components.Components,
  run_dir: pathlib.Path,
  index: int,
  incarnation: int,
  should_stop: Callable[[], bool],
) -> None:
  """An actor process."""
  from impala_jax.distributed import endpoints

  address = _wait_for_address(run_dir, should_stop)
  if address is None:
    return
  with contextlib.ExitStack() as stack:
    keys = _keys(parts.config, run_dir)
    client = endpoints.open_control(address['control'], keys)
    stack.callback(client.close)
    writer = stack.enter_context(
      endpoints.open_writer(address['transport'], parts.layout, keys)
    )
    drive_actor(parts, writer, client, client, index, incarnation, should_stop)


def drive_actor(
  parts: components.Components,
  writer: transport.Writer,
  source: actor_lib.ParameterSource,
  control: Any,
  index: int,
  incarnation: int,
  should_stop: Callable[[], bool],
) -> None:
  """Runs one actor and its reports, in a process or a thread of its own."""
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
    try:
      told_to_stop = told_to_stop or not reporter.maybe_report(totals())
    except transport.TransportError as e:
      logging.warning('report failed: %s', e)
    return told_to_stop or should_stop()

  environment = parts.make_environments(index)
  actor = actor_lib.Actor(
      parts.agent, environment, parts.layout, writer, source,
      unroll_length=config.actor.unroll_length, actor_id=index,
      incarnation=incarnation,
      seed=registry.random_seed(config.seed, index, incarnation),
      inference_batch=config.actor.inference_batch,
      send_logits=config.actor.send_logits, should_stop=stop,
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
  from impala_jax.distributed import endpoints

  address = _wait_for_address(run_dir, should_stop)
  if address is None:
    return
  client = endpoints.open_control(address['control'], _keys(parts.config, run_dir))
  drive_evaluator(parts, run_dir, client, incarnation, should_stop)


def drive_evaluator(
  parts: components.Components,
  run_dir: pathlib.Path,
  control: Any,
  incarnation: int,
  should_stop: Callable[[], bool],
) -> None:
  """Evaluates until the run ends, then writes the last evaluation and a video."""
  config = parts.config
  reporter = control_lib.Reporter(control, 'evaluator', 0, incarnation, interval=1.0)
  ended = False

  def run_ended() -> bool:
    nonlocal ended
    try:
      ended = ended or not reporter.maybe_report({})
    except transport.TransportError:
      ended = True  # A learner that has gone has also written its checkpoint.
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


def _wait_for_address(
  run_dir: pathlib.Path, should_stop: Callable[[], bool]
) -> dict[str, str] | None:
  """The learner's addresses; None if told to stop before.

  Raises:
    TimeoutError: no learner came up.
  """
  path = run_dir / 'address.json'
  deadline = time.monotonic() + _START_TIMEOUT
  for _ in _until(deadline):
    if should_stop():
      return None
    if path.exists():
      return json.loads(path.read_text())
  raise TimeoutError(f'no learner wrote {path} within {_START_TIMEOUT:.0f} s')


def _until(deadline: float, pause: float = 0.2) -> Iterator[None]:
  while time.monotonic() < deadline:
    yield
    time.sleep(pause)
