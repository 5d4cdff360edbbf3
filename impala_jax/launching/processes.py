"""The process of a role: the environment it is started in, and why it ended."""

import os
import pathlib
import signal

from impala_jax.distributed.roles import run as roles
from impala_jax.runtime import files, role_environment
from impala_jax.runtime.run_directory import RunDirectory


def environment_of(
  run: RunDirectory,
  role: str,
  index: int,
  incarnation: int,
  patience: float | None = None,
) -> dict[str, str]:
  """Environment variables of a role's process that this process starts.

  Args:
    run: its settings say on what the role computes.
    role: name.
    index: of the process within the role.
    incarnation: of the process.
    patience: seconds that it waits for a learner; None for one that serves.
  """
  told = role_environment.variables(
    run_dir=run.path, index=index, incarnation=incarnation, parent=os.getpid()
  )
  if patience is not None:
    told |= role_environment.variables(patience=patience)
  environment = {
    **os.environ,
    **told,
    'PYTHONUNBUFFERED': '1',
    'PYTHONIOENCODING': 'utf-8:backslashreplace',  # Of logs, whoever started the run.
    'TF_CPP_MIN_LOG_LEVEL': '2',  # TensorFlow only carries Reverb here.
  }
  if role in ('learner', 'all'):
    # What TLS 1.2 may use does not go with the run's certificates: so its control takes
    # TLS 1.3 alone, for which gRPC has no option.
    environment['GRPC_SSL_CIPHER_SUITES'] = 'ECDHE-RSA-AES256-GCM-SHA384'
    return environment
  platform = run.settings().get(role, {}).get('platform', 'auto')
  if role == 'evaluator' or (role == 'actor' and platform == 'auto'):
    platform = 'cpu'
  if platform == 'cpu':
    # The learner's accelerator must not be seized by its actors.
    environment['JAX_PLATFORMS'] = 'cpu'
  else:
    # A GPU may be shared with the learner: take what is needed, not three quarters.
    environment.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  if role != 'inference':
    # XLA's threads for a policy call: with one, no core is woken for a millisecond's
    # work, which environments and other actors make better use of.
    environment.setdefault('NPROC', '1')
  return environment


def explain_exit(code: int) -> str:
  if code == -signal.SIGBUS and (full := files.what_is_full()):
    return f'was ended by signal SIGBUS, for {full}'
  if code < 0:
    return f'was ended by signal {signal.Signals(-code).name}'
  if code == roles.MISTAKE:
    return 'cannot work as it is configured'
  if code == roles.STOPPED:
    return 'was told to stop by SIGTERM'
  return f'ended with exit code {code}'


def cause(log: pathlib.Path) -> str:
  """The last words of a role's log that tell why it ended."""
  try:
    lines = log.read_text('utf-8', 'replace').splitlines()[-200:]
  except OSError as e:
    return f'no log: {e.strerror}'
  for line in reversed(lines):
    if line.startswith('CAUSE: '):
      return line.removeprefix('CAUSE: ')
  words = [line for line in lines if line.strip()]
  return f'{words[-1].strip()} (see {log})' if words else f'see {log}'
