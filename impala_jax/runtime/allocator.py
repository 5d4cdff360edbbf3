"""Keeps memory that was freed, so that each XLA computation finds its own again.

XLA allocates the memory of a whole computation when it starts and frees it at its end:
hundreds of MB for an update on CPU. The C library by default returns so much to the
system, which hands out each page anew and zeroed at its next use: a fifth to a quarter
of the CPU time of an update.
"""

import ctypes
import logging
import sys

# Of glibc's malloc.h, with the value each gets.
_OPTIONS = {
  'M_MMAP_MAX': (-4, 0),  # Nothing of malloc's in mappings of its own,
  'M_TRIM_THRESHOLD': (-1, -1),  # nothing of the heap returned,
  'M_ARENA_MAX': (-8, 1),  # and one heap, as those of threads are small.
}


def keep_memory() -> bool:
  """Makes this process keep what it frees, for its own next use.

  It then stays as large as it has been at most. Call it before there are threads: those
  that have a heap of their own go on with it.

  Returns:
    Whether the C library (glibc) took it; any other is left as it is.
  """
  if sys.platform != 'linux':
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (OSError, AttributeError):
    return False
  refused = [name for name, option in _OPTIONS.items() if not mallopt(*option)]
  if refused:
    logging.info('the C library refuses %s', ', '.join(refused))
  return not refused
