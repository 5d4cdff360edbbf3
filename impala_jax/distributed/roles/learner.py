"""A learner's process: queue, parameter server and updates, or one of several such.

A role finds all it needs in the run directory: `config.json`, and `address.json`
once the learner is up. Roles run until the learner says stop, `should_stop` says
so, or the learner has been out of reach for too long; no wait is without an end.
"""

import contextlib
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any

from impala_jax import components
from impala_jax.distributed.control import board as control_lib
from impala_jax.distributed.gang import gang as learner_gang
from impala_jax.distributed.gang import start as gang_start
from impala_jax.distributed.security import keys as run_keys
from impala_jax.learning import checkpointing
from impala_jax.learning import learner as learner_lib
from impala_jax.learning import loop as learner_loop
from impala_jax.reporting import metrics
from impala_jax.runtime import files, role_environment
from impala_jax.runtime.run_directory import RunDirectory

_GOODBYE_TIMEOUT = 10.0  # Seconds that a learner waits for its clients to leave.


def run(
  parts: components.Components,
  here: role_environment.RoleEnvironment,
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
  gang = gang_start.join(here, should_stop)
  if gang is None:
    return False
  with gang.together():
    loop = _learn(parts, here, gang, should_stop)
    gang.finish()
  logging.info('ended at %d updates, %d frames', loop.updates, loop.frames)
  if gang.stopped_by is not None and not should_stop():
    # Not an end that was asked of this process: it is to be started again.
    raise learner_gang.GangError(f'learner {gang.stopped_by} was told to stop')
  return loop.frames >= parts.config.learner.total_frames


def _learn(
  parts: components.Components,
  here: role_environment.RoleEnvironment,
  gang: learner_gang.Alone,
  should_stop: Callable[[], bool],
) -> learner_loop.LearnerLoop:
  from impala_jax.distributed.control import (
    endpoints,
    unroll_counts,
  )
  from impala_jax.distributed.control import relay as relayed_control

  config, run = parts.config, RunDirectory(here.run_dir)
  first = gang.index == 0
  learner = parts.make_learner()
  resume = _resume(run.checkpoints, learner, gang)
  keys = run_keys.folder_of(config, run.path)
  with contextlib.ExitStack() as stack:
    control: Any = control_lib.Control()
    writer = saver = None
    keep: Callable[[dict[str, Any]], None] = lambda record: None
    if first:
      writer = metrics.MetricsWriter(run.path)
      stack.callback(writer.close)
      saver = checkpointing.Saver(run.checkpoints, config.learner.keep_checkpoints)
      stack.callback(saver.close)
    else:
      control = relayed_control.RelayedControl(gang.index, here.incarnation)
      keep = control.keep
    reader, addresses = stack.enter_context(
      endpoints.serve(
        parts.layout,
        config.learner.batch_size // gang.count,
        config.queue_capacity // gang.count,
        control,
        here,
        keys,
        config.transport.open_port,
      )
    )

    def on_record(record: dict[str, Any]) -> None:
      keep(record)
      unroll_counts.write(run.path, gang.index, control, reader)

    loop = learner_loop.LearnerLoop(
        config, learner, reader, control, writer, saver, resume, on_record,
        should_stop, gang,
    )  # fmt: skip
    # Learner 0 last: its addresses say that all others' can be read.
    if not first:
      files.write_json(run.address(gang.index), addresses)
    gang.gather()
    if first:
      files.write_json(run.address(0), {**addresses, 'learners': gang.count})
    logging.info('serves %s', addresses)
    address = gang.spread(addresses['control'])
    if not first:
      control.relay(endpoints.open_control(address, keys), reader.stats)
    # The first to hear of an error: the others wait for this learner.
    stack.enter_context(gang.together())
    loop.run()
    if first and loop.frames >= config.learner.total_frames:
      # Before the actors are told to stop: else they would wait for another learner.
      run.end('finished')
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
