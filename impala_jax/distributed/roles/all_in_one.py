"""A whole run in one process: actors and evaluator as threads, `local` transport.

The same roles as on many machines, for notebooks, for machines without Reverb, and
for tests.
"""

import contextlib
import pathlib
import threading
import time
from collections.abc import Callable

from impala_jax import components
from impala_jax.distributed.control import board
from impala_jax.distributed.roles import actor as actor_role
from impala_jax.distributed.roles import evaluator as evaluator_role
from impala_jax.distributed.roles import policies
from impala_jax.distributed.transport import local as local_transport
from impala_jax.learning import checkpointing, own_checkpoints
from impala_jax.learning import loop as learner_loop
from impala_jax.learning import recorder as recorder_lib
from impala_jax.reporting import record, sinks
from impala_jax.runtime.run_directory import RunDirectory

_JOIN_TIMEOUT = 30.0


class ActorFailed(RuntimeError):
  """An actor's thread raised; the cause is chained."""


def run(
  parts: components.Components,
  run_dir: pathlib.Path | None,
  should_stop: Callable[[], bool] = lambda: False,
  on_record: Callable[[record.Status], None] = lambda status: None,
  check: Callable[[], None] = lambda: None,
) -> learner_loop.LearnerLoop:
  """Trains to the configured frames; returns the loop with the final state.

  Args:
    parts: of the run.
    run_dir: where metrics and checkpoints go; None keeps nothing. An existing
      checkpoint there is gone on from.
    should_stop: ends the run early.
    on_record: called with each record.
    check: raises where `run_dir` belongs to another process by now.

  Raises:
    ActorFailed: an actor raised.
    checkpointing.CheckpointError: `run_dir` has checkpoints, and none is sound and of
      this run.
  """
  config = parts.config
  run = own = None
  if run_dir is not None:
    run = RunDirectory(run_dir)
    own = own_checkpoints.take_over(run, config)
  learner, resume = checkpointing.go_on(
    own.sound if own else (), config, parts.make_learner
  )
  control = board.Board(config.environment.levels)
  queue = local_transport.LocalTransport(
    parts.layout, config.learner.batch_size, config.queue_capacity
  )
  failures: list[Exception] = []
  stop = threading.Event()

  def stopping() -> bool:
    return stop.is_set() or bool(failures) or should_stop()

  def guarded(work: Callable[[], None]) -> None:
    try:
      work()
    except Exception as e:
      failures.append(e)

  def actor(index: int) -> None:
    policy = policies.local(parts, control, index, 0)
    actor_role.drive(parts, queue.writer(), policy, control, index, 0, stopping)

  def evaluator() -> None:
    assert run_dir is not None
    # Until the learner has written its last checkpoint, only the control ends it.
    evaluator_role.drive(
      parts, run_dir, control, 0, lambda: bool(failures), check=check
    )

  with contextlib.ExitStack() as stack:
    stack.callback(queue.close)
    writer = saver = None
    if run is not None and own is not None:
      writer = sinks.RecordWriter(
        run.path, resume.metadata if resume else {}, check=check
      )
      stack.callback(writer.close)
      saver = checkpointing.Saver(
        run.checkpoints, config.learner.keep_checkpoints, *own, check
      )
      stack.callback(saver.close)
    recorder = recorder_lib.Recorder(
      config, control, queue.stats, writer, on_record, resume, queue.refusals
    )
    loop = learner_loop.LearnerLoop(
      config, learner, queue, control, recorder, saver, resume, stopping
    )
    threads = [
      threading.Thread(target=guarded, args=(lambda i=i: actor(i),), name=f'actor-{i}')
      for i in range(config.actor.num_actors)
    ]
    evaluating = None
    if run_dir is not None and config.evaluator.enabled:
      evaluating = threading.Thread(target=guarded, args=(evaluator,), name='evaluator')
    for thread in [*threads, *([evaluating] if evaluating else [])]:
      thread.daemon = True
      thread.start()
    try:
      loop.run()
    except learner_loop.NotFinite as e:
      if run_dir is not None:  # Its successor would do the same again.
        RunDirectory(run_dir).end('failed', f'learner: {e}')
      raise
    finally:
      control.stop()
      stop.set()
      deadline = time.monotonic() + _JOIN_TIMEOUT
      for thread in threads:
        thread.join(timeout=max(0.0, deadline - time.monotonic()))
      if evaluating is not None:
        evaluating.join()
    if not failures:
      recorder.last_record(loop.updates)
  if failures:
    raise ActorFailed(f'{type(failures[0]).__name__}: {failures[0]}') from failures[0]
  return loop
