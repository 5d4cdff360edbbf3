"""An inference server's process: the policy of many actors, batched on one device.

It follows its learner as an actor does, and fetches parameters as often: once in the
time that its environments need for an unroll each. What it counts it reports.
"""

import contextlib
import logging
import time
from collections.abc import Callable

from impala_jax import components
from impala_jax.acting import device_policy
from impala_jax.acting import patience as patience_lib
from impala_jax.distributed.control import endpoints, learner_link, locator, reporter
from impala_jax.distributed.inference import batcher as inference_batcher
from impala_jax.distributed.inference import server as inference_tcp
from impala_jax.distributed.roles import policies
from impala_jax.distributed.security import keys as run_keys
from impala_jax.distributed.security import ports
from impala_jax.distributed.transport import protocol as transport
from impala_jax.environments import registry
from impala_jax.runtime import files, role_environment, stage
from impala_jax.runtime.run_directory import RunDirectory

_TICK = 0.05  # Seconds between looks at what there is to do.
_SEEDS = 1_000_000_000  # Where their indices begin; actors have the smaller ones.
_GOODBYE = 5.0  # Seconds for the actors to leave a run that has ended.


def run(
  parts: components.Components,
  here: role_environment.RoleEnvironment,
  should_stop: Callable[[], bool],
) -> None:
  """Serves until the learner or `should_stop` says stop.

  Raises:
    config.ConfigError: there is no such device.
    transport.TransportError, TimeoutError: the learner stayed away.
    OSError: the port is taken.
    run_keys.KeysError: see there.
  """
  config, index, incarnation = parts.config, here.index, here.incarnation
  run = RunDirectory(here.run_dir)
  stage.enter('waiting for the learner, then compiling the policy')
  platform = config.inference.platform
  device = device_policy.device_for(platform, index, 'inference.platform')
  keys = run_keys.folder_of(config, run.path)
  server_keys = None if keys is None else run_keys.load(keys, run_keys.INFERENCE)
  where = locator.Locator(
    run.path, index, config.transport.kind, parts.layout, keys, here.patience
  )
  link = learner_link.open_link(where, should_stop, writes=False)
  if link is None:
    return
  with contextlib.ExitStack() as stack:
    stack.enter_context(contextlib.closing(link))
    room = config.inference_environments
    seed = registry.random_seed(config.seed, _SEEDS + index, incarnation)
    policy = device_policy.DevicePolicy(
      parts.agent,
      room,
      inference_batcher.batch_sizes(config.inference.max_batch),
      device=device,
      seed=seed,
    )
    following = _Following(parts, policy, link, here, should_stop)
    while not following.renew(first=True):
      if following.stopping():
        return
      time.sleep(_TICK)
    start = time.monotonic()
    policy.compile(parts.spec)
    logging.info('compiled in %.1f s', time.monotonic() - start)
    batcher = inference_batcher.Batcher(
      policy, room, 1e-3 * config.inference.deadline_ms
    )
    stack.callback(batcher.close)
    server = inference_tcp.Server(
      batcher,
      policies.wire(parts.agent, parts.spec),
      '' if here.host else ports.LOOPBACK,
      here.inference_port,
      server_keys,
    )
    stack.callback(server.close)
    address = endpoints.join(here.host or ports.LOOPBACK, server.port)
    files.write_json(
      run.inference_address(index), {'address': address, 'incarnation': incarnation}
    )
    logging.info('serves at %s', address)
    following.follow(batcher)
    deadline = time.monotonic() + _GOODBYE
    while batcher.clients() and time.monotonic() < deadline and not should_stop():
      time.sleep(_TICK)
    following.say_goodbye()


class _Following:
  """Parameters from the learner, and reports to it."""

  def __init__(
    self,
    parts: components.Components,
    policy: device_policy.DevicePolicy,
    link: learner_link.LearnerLink,
    here: role_environment.RoleEnvironment,
    should_stop: Callable[[], bool],
  ):
    self._length = parts.config.actor.unroll_length
    self._tolerated = parts.config.learner.max_policy_lag // 4
    self._policy = policy
    self._link = link
    self._who = f'inference server {here.index}'
    self._should_stop = should_stop
    self._reporter = reporter.Reporter(link, 'inference', here.index, here.incarnation)
    self._patience = here.patience or patience_lib.SECONDS
    self._lost_at: float | None = None
    self._batcher: inference_batcher.Batcher | None = None
    self._told_to_stop = False
    self._asked = self._fetched = 0  # Rows at those times.

  def follow(self, batcher: inference_batcher.Batcher) -> None:
    """Until the end; raises what ended it."""
    self._batcher = batcher
    while not self.stopping():
      if batcher.error is not None:
        raise batcher.error
      rows = batcher.totals().rows
      # One unroll of every environment; or, where old ones are refused, sooner.
      if rows - self._fetched >= self._length * max(1, batcher.environments()):
        self.renew()
        self._asked = self._fetched = rows
      elif self._tolerated and rows > self._asked:
        self.renew(self._tolerated)
        self._asked = rows
      time.sleep(_TICK)

  def renew(self, tolerated: int = 0, first: bool = False) -> bool:
    """Takes parameters that are more than `tolerated` updates ahead.

    Without the learner the policy goes on as it is: actors notice by themselves.

    Raises:
      transport.TransportError: the learner has been away for too long.
    """
    now = time.monotonic()
    try:
      newer = self._link.fetch(self._policy.version + tolerated)
      if newer is None and first:
        raise transport.TransportError('the learner has no parameters yet')
    except transport.TransportError as e:
      self._lost_at = self._lost_at or now
      if now - self._lost_at > self._patience:
        raise transport.TransportError(
          f'{self._who} has been without its learner for {self._patience:.0f} s: {e}'
        ) from e
      return False
    self._lost_at = None
    if newer is not None:
      self._policy.set_parameters(*newer)
    return True

  def stopping(self) -> bool:
    with contextlib.suppress(transport.TransportError):
      self._told_to_stop = self._told_to_stop or not self._report()
    return self._told_to_stop or self._should_stop()

  def say_goodbye(self) -> None:
    with contextlib.suppress(transport.TransportError):
      self._report(left=True)

  def _report(self, left: bool = False) -> bool:
    if self._batcher is None:
      return self._reporter.maybe_report({}, left=left)
    gauges = {
      'clients': self._batcher.clients(),
      'environments': self._batcher.environments(),
      'version': self._policy.version,
    }
    return self._reporter.maybe_report(vars(self._batcher.totals()), gauges, left)
