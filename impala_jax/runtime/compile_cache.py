"""Keeps what XLA compiled on disk: a process that starts again need not repeat it.

The cache is JAX's own. Here it gets a place, one for each kind of processor: code that
XLA compiled for one may not run on another, and homes are shared between hosts.
"""

import hashlib
import logging
import os
import pathlib
import platform
import sys

_VARIABLE = 'JAX_COMPILATION_CACHE_DIR'
# Seconds of a compilation from which on it is kept: above those of small operations.
_WORTH = '0.3'


def enable() -> pathlib.Path | None:
  """Switches the cache on in this process and those that it starts.

  It is `impala_jax/xla-...` in XDG_CACHE_HOME (by default ~/.cache), for this user
  alone: whoever can write there can have code run. JAX_COMPILATION_CACHE_DIR names
  another place, which is left alone; empty, it switches the cache off.

  Returns:
    The place; None where there is none, as where nothing can be written to it.
  """
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', _WORTH)
  if _VARIABLE in os.environ:
    place = os.environ[_VARIABLE]
    return pathlib.Path(place) if place else None
  try:
    home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    folder = pathlib.Path(home, 'impala_jax', f'xla-{_processor()}')
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
      raise PermissionError(f'{folder} cannot be written to')
  except (OSError, RuntimeError) as e:  # RuntimeError: there is no home.
    logging.info('no cache of compilations: %s', e)
    return None
  os.environ[_VARIABLE] = str(folder)
  if 'jax' in sys.modules:  # Which read its variables when it was imported.
    config = sys.modules['jax'].config
    config.update('jax_compilation_cache_dir', str(folder))
    config.update('jax_persistent_cache_min_compile_time_secs', float(_WORTH))
  return folder


def _processor() -> str:
  """Twelve digits that differ where compiled code may not run."""
  words = [platform.machine()]
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    lines = [platform.processor()]
  for line in lines:
    name = line.partition(':')[0].strip()
    # What the processor can do, by the names of x86 and of ARM; the rest varies.
    if name in ('flags', 'Features', 'model', 'cpu family', 'CPU part'):
      words.append(line)
    if not line:  # The end of the first processor.
      break
  return hashlib.sha256('\n'.join(words).encode()).hexdigest()[:12]
