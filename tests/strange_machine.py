"""A machine whose names and whose user's shell are of no help to a run.

Its name and `localhost` have no address, a proxy that cannot be reached is set for all
traffic, and the terminal knows ASCII alone.
"""

import functools
import os
import subprocess

# Its own mount namespace, in which /etc/hosts is another file.
_ENTER = (
  'unshare',
  '--mount',
  'sh',
  '-ec',
  'hosts=$(mktemp)\necho 127.0.0.1 somebody-else > "$hosts"\n'
  'mount --bind "$hosts" /etc/hosts\nrm "$hosts"\nexec "$@"',
  'sh',
)
_PROXY = 'http://127.0.0.1:9'
_ENVIRONMENT = {
  **dict.fromkeys(('http_proxy', 'https_proxy', 'all_proxy', 'grpc_proxy'), _PROXY),
  'no_proxy': 'example.org',
  'LC_ALL': 'C',
  'PYTHONUTF8': '0',
  'PYTHONCOERCECLOCALE': '0',
  'PYTHONIOENCODING': 'ascii',
}


class Machine:
  """How to start something there.

  Args:
    strange: False: on the machine as it is.

  Attributes:
    enter: comes before a command; empty where there may be no namespaces, so that names
      are as they are.
    environment: variables.
  """

  def __init__(self, strange: bool = True):
    self.enter = list(_enter()) if strange else []
    self.environment = {**os.environ, **(_ENVIRONMENT if strange else {})}


@functools.cache
def _enter() -> tuple[str, ...]:
  program, *rest = _ENTER
  for user in ([], ['--map-root-user']):
    enter = (program, *user, *rest)
    done = subprocess.run([*enter, 'true'], capture_output=True, check=False)
    if done.returncode == 0:
      return enter
  return ()
