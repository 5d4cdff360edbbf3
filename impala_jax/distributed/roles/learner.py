"""A learner's process: queue, parameter server and updates, or one of several such.

A role finds all it needs in the run directory: `config.json`, and `address.json`
once the learner is up. Roles run until the learner says stop, `should_stop` says
so, or the learner has been out of reach for too long; no wait is without an end.
"""

import contextlib
import logging
import time
from collections.abc import Callable

from impala_jax import components
from impala_jax.distributed.control import board, protocol
from impala_jax.distributed.gang import meeting
from impala_jax.distributed.gang import start as gang_start
from impala_jax.distributed.security import keys as run_keys
from impala_jax.learning import agreement, checkpointing, own_checkpoints
from impala_jax.learning import loop as learner_loop
from impala_jax.learning import recorder as recorder_lib
from impala_jax.reporting import record, sinks
from impala_jax.runtime import (
  checkpoint_files,
  files,
  lease,
  role_environment,
  stage,
)
from impala_jax.runtime.run_directory import RunDirectory

_GOODBYE_TIMEOUT = 10.0  # Seconds that a learner waits for its clients to leave.


def run(
  parts: components.Components,
  here: role_environment.RoleEnvironment,
  should_stop: Callable[[], bool],
) -> bool:
  """The learner process, or one of several: queue, parameter server and updates.

  Goes on from the newest sound checkpoint of the run directory, if there is one.
  Learner 0 writes records and checkpoints; the others report to it.

  Returns:
    Whether the run is whole: all its frames are done.

  Raises:
    meeting.GangError: another learner has failed or was told to stop. (Where this
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
    raise meeting.GangError(f'learner {gang.stopped_by} was told to stop')
  return loop.frames >= parts.config.learner.total_frames


def _learn(
  parts: components.Components,
  here: role_environment.RoleEnvironment,
  gang: agreement.Agreement,
  should_stop: Callable[[], bool],
) -> learner_loop.LearnerLoop:
  from impala_jax.distributed.control import endpoints, unroll_counts
  from impala_jax.distributed.control import relay as relay_lib

  config, run = parts.config, RunDirectory(here.run_dir)
  first = gang.index == 0
  stage.enter('making the network')
  own = own_checkpoints.take_over(run, config) if first else None
  if own is not None:
    learner, resume = checkpointing.go_on(own.sound, config, parts.make_learner)
    gang.spread(resume.path.name if resume else '')
  else:
    # Learner 0 judges what is there; the others read what it goes on from.
    name = gang.spread()
    chosen = checkpoint_files.stored(run.checkpoints / name) if name else None
    sound = [chosen] if chosen else []
    learner, resume = checkpointing.go_on(sound, config, parts.make_learner)
  keys = run_keys.folder_of(config, run.path)
  with contextlib.ExitStack() as stack:
    levels = config.environment.levels
    processes: dict[protocol.Role, range] = {
      'actor': range(config.actor.num_actors),
      'evaluator': range(1),
      'inference': range(config.inference.servers),
      'learner': range(1, gang.count if first else 1),
    }
    writer = saver = relay = None
    if own is not None:
      control = board.Board(levels, processes)
      check = lambda: lease.check(run, 'learner', 0, here.incarnation)
      writer = sinks.RecordWriter(
        run.path, resume.metadata if resume else {}, check=check
      )
      stack.callback(writer.close)
      saver = checkpointing.Saver(
        run.checkpoints, config.learner.keep_checkpoints, *own, check
      )
      stack.callback(saver.close)
    else:
      control = relay = relay_lib.Relay(levels, gang.index, here.incarnation, processes)
    reader, addresses = stack.enter_context(
      endpoints.serve(
        config.transport.kind,
        parts.layout,
        config.learner.batch_size // gang.count,
        config.queue_capacity // gang.count,
        control,
        here,
        keys,
        config.transport.open_port,
      )
    )

    def on_record(status: record.Status) -> None:
      if relay is not None:
        relay.keep(
          {k: getattr(status.record, k) for k in ('policy_lag_mean', 'policy_lag_max')}
        )
      unroll_counts.write(run.path, gang.index, control, reader)

    recorder = recorder_lib.Recorder(
      config, control, reader.stats, writer, on_record, resume, reader.refusals
    )
    loop = learner_loop.LearnerLoop(
      config,
      learner,
      reader,
      control,
      recorder,
      saver,
      resume,
      should_stop,
      gang,
      _given_out(run, resume),
    )
    # Learner 0 last: its addresses say that all others' can be read.
    if not first:
      files.write_json(run.address(gang.index), addresses)
    gang.gather()
    if first:
      files.write_json(run.address(0), {**addresses, 'learners': gang.count})
    logging.info('serves %s', addresses)
    address = gang.spread(addresses['control'])
    if relay is not None:
      relay.relay(endpoints.open_control(address, keys), reader.stats)
    stage.enter(stage.UNDER_WAY)
    # The first to hear of an error: the others wait for this learner.
    stack.enter_context(gang.together())
    try:
      loop.run()
    except learner_loop.NotFinite as e:
      run.end('failed', f'learner: {e}')  # Its successor would do the same again.
      raise
    if first and loop.frames >= config.learner.total_frames:
      # Before the actors are told to stop: else they would wait for another learner.
      run.end('finished')
    control.stop()
    # Actors first: what they confirm while the queue goes away means nothing.
    _wait_for_goodbye(control)
    if relay is not None:
      recorder.last_record(loop.updates)
      relay.end_relay()
    gang.gather()
    if relay is None:
      recorder.last_record(loop.updates)
  return loop


def _given_out(run: RunDirectory, resume: checkpointing.Checkpoint | None) -> int:
  """The newest version of parameters that an earlier learner of the run gave out.

  Or some more: the status, which says how far it was, may be seconds old.
  """
  seen = int(run.read_status().get('updates', 0))
  begin = int(resume.metadata['updates']) if resume else 0
  return seen + max(1000, seen - begin) if seen else 0


def _wait_for_goodbye(control: protocol.Control) -> None:
  deadline = time.monotonic() + _GOODBYE_TIMEOUT
  while time.monotonic() < deadline:
    present = [h for p, h in control.peers() if p.role == 'actor' and not p.left]
    # An actor that fell silent long ago has crashed and will not say goodbye.
    if not any(time.monotonic() - heard < 5.0 for heard in present):
      return
    time.sleep(0.1)
