"""How the learners of a run become a gang: they meet, and JAX joins their devices."""

import functools
import logging
import os
import signal
from collections.abc import Callable

import jax
from jax._src.lib import _jax

from impala_jax.distributed.control import endpoints
from impala_jax.distributed.gang import gang as learner_gang
from impala_jax.distributed.gang import meeting
from impala_jax.distributed.security import ports
from impala_jax.learning import agreement
from impala_jax.runtime import role_environment

_HEARTBEAT = 60  # Seconds, of jax.distributed itself.
_CONNECT = 120  # Seconds, likewise: all are there by then.


def join(
  here: role_environment.RoleEnvironment,
  should_stop: Callable[[], bool],
) -> agreement.Agreement | None:
  """Meets the other learners of the run; before anything else uses JAX's devices.

  Args:
    here: how many learners there are, which this is, and by what name others reach it.
    should_stop: asked while waiting.

  Returns:
    The gang, or None if told to stop before all had come.

  Raises:
    ValueError: names the variable that is out of range.
    GangError: some did not come in time.
    RuntimeError: they came, but JAX could not connect them.
  """
  index, count, host = here.index, here.count, here.host
  if index >= count:
    raise ValueError(f"IMPALA_INDEX is '{index}': must lie in [0, {count})")
  if count == 1:
    return agreement.Agreement()
  if index == 0:
    found = meeting.receive_from_others(here.run_dir, host, count, should_stop)
    if found is None:
      return None
    gang = learner_gang.Gang(index, count, found, _leave_process)
  else:
    connection = meeting.reach_first(here.run_dir, index, should_stop)
    if connection is None:
      return None
    gang = learner_gang.Gang(index, count, {0: connection}, _leave_process)
  with gang.together():
    _connect_devices(gang, host)
  logging.info('learner %d of %d: all are here', index, count)
  return gang


def _connect_devices(gang: learner_gang.Gang, host: str) -> None:
  address = bind = None
  if gang.index == 0:
    port, lock = ports.reserve(0)
    lock.close()
    address = endpoints.join(host or ports.LOOPBACK, port)
    bind = address if not host else None
  ports.bypass_proxy()
  jax.config.update('jax_check_proxy_envs', False)  # It would warn of them.
  on_stop = signal.getsignal(signal.SIGTERM)
  # For learners on CPUs; others have means of their own.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # Else it asks for the address of this machine's name, which may have none or one that
  # is of no use to others; JAX has no option for it.
  _jax.make_gloo_tcp_collectives = functools.partial(
    _jax.make_gloo_tcp_collectives, hostname=host or ports.LOOPBACK
  )
  jax.distributed.initialize(
    gang.spread(address),
    gang.count,
    gang.index,
    coordinator_bind_address=bind,
    cluster_detection_method='deactivate',  # Launchers say all there is to know.
    initialization_timeout=_CONNECT,
    heartbeat_timeout_seconds=_HEARTBEAT,
  )
  # JAX has put a handler of its own in the place of this process's.
  signal.signal(signal.SIGTERM, on_stop)
  with gang.updating():  # They tell each other of their devices.
    jax.devices()


def _leave_process(cause: str) -> None:
  logging.error('ends at once: %s', cause)
  # Where supervisors look for it.
  print(f'CAUSE: {cause}', flush=True)
  os._exit(1)
