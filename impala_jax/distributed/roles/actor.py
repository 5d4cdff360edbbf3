"""An actor's process, or its thread where a run is one process."""

import collections
import contextlib
import logging
from collections.abc import Callable

from impala_jax import components
from impala_jax.acting import actor as actor_lib
from impala_jax.acting import patience as patience_lib
from impala_jax.acting import policy as policy_lib
from impala_jax.distributed.control import protocol as control_lib
from impala_jax.distributed.control import reporter as reporter_lib
from impala_jax.distributed.security import keys as run_keys
from impala_jax.distributed.transport import protocol as transport
from impala_jax.environments import registry
from impala_jax.runtime import role_environment, stage

_START_TIMEOUT = 180.0  # Seconds for environments to come up.


def run(
  parts: components.Components,
  here: role_environment.RoleEnvironment,
  should_stop: Callable[[], bool],
) -> None:
  """An actor process; it follows a learner that restarts or moves.

  Raises:
    transport.TransportError, TimeoutError: the learner, or the inference server, stayed
      away, see `Actor.run`.
    config.ConfigError: there is no device for its policy.
  """
  from impala_jax.distributed.control import learner_link, locator
  from impala_jax.distributed.roles import policies

  index, incarnation = here.index, here.incarnation
  keys = run_keys.folder_of(parts.config, here.run_dir)
  where = locator.Locator(
    here.run_dir, index, parts.config.transport.kind, parts.layout, keys, here.patience
  )
  stage.enter('waiting for the learner')
  link = learner_link.open_link(where, should_stop, writes=True)
  if link is None:
    return
  with contextlib.closing(link):
    policy: policy_lib.Policy
    if parts.config.inference.servers:
      policy = policies.remote(parts, here.run_dir, index, keys)
    else:
      policy = policies.local(parts, link, index, incarnation)
    with contextlib.closing(policy):
      drive(
        parts,
        link,
        policy,
        link,
        index,
        incarnation,
        should_stop,
        here.patience or patience_lib.SECONDS,
      )


def drive(
  parts: components.Components,
  writer: transport.Writer,
  policy: policy_lib.Policy,
  control: control_lib.Client,
  index: int,
  incarnation: int,
  should_stop: Callable[[], bool],
  patience: float = patience_lib.SECONDS,
) -> None:
  """Runs one actor and its reports, in a process or a thread of its own.

  The actor gives up after `patience` seconds without its learner, or the inference
  server that is its `policy`.
  """
  config = parts.config
  reporter = reporter_lib.Reporter(control, 'actor', index, incarnation)
  levels = config.environment.levels
  given_up = collections.Counter[str]()  # Environments, by gauges of tasks.
  told_to_stop = under_way = False

  def totals() -> dict[str, float]:
    return {
      'agent_steps': actor.agent_steps,
      'unrolls': actor.unrolls_sent,
      'unrolls_dropped': actor.unrolls_dropped,
      **{f'seconds/{k}': v for k, v in actor.seconds.items()},
      **{f'engines/{k}': v for k, v in count_engines().items()},
    }

  def report(left: bool = False) -> bool:
    if not left and not reporter.due:
      return True
    gauges = {'version': actor.version, **given_up}
    return reporter.maybe_report(totals(), gauges, left)

  def stop() -> bool:
    nonlocal told_to_stop, under_way
    if not under_way and actor.agent_steps:
      under_way = True
      stage.enter(stage.UNDER_WAY)
    while actor.episodes:
      episode = actor.episodes.popleft()
      reporter.add(
        control_lib.Episode(episode.task_id, episode.episode_return, episode.length)
      )
    while actor.failures:
      failure = actor.failures.popleft()
      words = failure.cause
      if failure.given_up:
        given_up[f'given_up/{failure.task_id}'] += 1
        words += '. The environment is given up'
        if failure.instead >= 0:
          given_up[f'instead/{failure.instead}'] += 1
          words += f' there, and plays {levels[failure.instead]} from now on'
      logging.warning('environment %d: %s', failure.env_id, words)
      reporter.add(
        control_lib.EnvironmentFailure(index, failure.env_id, failure.task_id, words)
      )
    # A report that fails is made again; how long for is the actor's business.
    with contextlib.suppress(transport.TransportError):
      told_to_stop = told_to_stop or not report()
    return told_to_stop or should_stop()

  count = config.actor.envs_per_actor
  stage.enter(f'starting {count} environments, then compiling the policy')
  environment = parts.make_environments(index)
  # Of environments with engines of their own.
  count_engines: Callable[[], dict[str, float]] = getattr(environment, 'counts', dict)
  engines = registry.engine_settings(config)
  actor = actor_lib.Actor(
    policy,
    environment,
    parts.layout,
    writer,
    unroll_length=config.actor.unroll_length,
    actor_id=index,
    incarnation=incarnation,
    seed=registry.random_seed(config.seed, index, incarnation),
    send_logits=config.actor.send_logits,
    should_stop=stop,
    patience=patience,
    environment_patience=_START_TIMEOUT + 2 * engines.reset_timeout,
  )
  try:
    actor.run()
  finally:
    environment.close()
    with contextlib.suppress(transport.TransportError):
      report(left=True)
