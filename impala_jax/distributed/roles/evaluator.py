"""The evaluator's process, or its thread where a run is one process."""

import contextlib
import pathlib
import time
from collections.abc import Callable

from impala_jax import components
from impala_jax.distributed.control import protocol as control_lib
from impala_jax.distributed.control import reporter as reporter_lib
from impala_jax.distributed.security import keys as run_keys
from impala_jax.distributed.transport import protocol as transport
from impala_jax.evaluation import evaluator
from impala_jax.runtime import lease, role_environment, stage
from impala_jax.runtime.run_directory import RunDirectory

_MISSED_END = 10.0  # Seconds without the learner; then the run is taken to have ended.


def run(
  parts: components.Components,
  here: role_environment.RoleEnvironment,
  should_stop: Callable[[], bool],
) -> None:
  """The evaluator process: every so often in training, and once at its end."""
  from impala_jax.distributed.control import learner_link, locator

  stage.enter(stage.UNDER_WAY)
  keys = run_keys.folder_of(parts.config, here.run_dir)
  where = locator.Locator(
    here.run_dir, 0, parts.config.transport.kind, parts.layout, keys, here.patience
  )
  link = learner_link.open_link(where, should_stop, writes=False)
  if link is None:
    return
  with contextlib.closing(link):
    drive(
      parts,
      here.run_dir,
      link,
      here.incarnation,
      should_stop,
      here.patience or _MISSED_END,
      lambda: lease.check(RunDirectory(here.run_dir), 'evaluator', 0, here.incarnation),
    )


def drive(
  parts: components.Components,
  run_dir: pathlib.Path,
  control: control_lib.Client,
  incarnation: int,
  should_stop: Callable[[], bool],
  patience: float = _MISSED_END,
  check: Callable[[], None] = lambda: None,
) -> None:
  """Evaluates until the run ends, then writes the last evaluation and a video.

  The run has ended, too, when its learner has been away for `patience` seconds: it
  has written its checkpoint. `check` raises where this process must not write any more.
  """
  config = parts.config
  reporter = reporter_lib.Reporter(control, 'evaluator', 0, incarnation, interval=1.0)
  ended = False

  def run_ended() -> bool:
    nonlocal ended
    try:
      ended = ended or not reporter.maybe_report({})
    except transport.TransportError:
      ended = reporter.unheard > patience
    return ended or should_stop()

  session = evaluator.Session(parts, run_dir, check)
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
