"""A process that keeps its memory does, and one that does not, does not."""

import subprocess
import sys

import pytest

_SCRIPT = """
import ctypes, sys
from impala_jax.runtime import allocator
if sys.argv[1] == 'keep':
  assert allocator.keep_memory()
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
block = ctypes.c_void_p(c.malloc(ctypes.c_size_t(256 << 20)))
ctypes.memset(block, 1, 256 << 20)
c.free(block)
with open('/proc/self/statm') as f:
  print(int(f.read().split()[1]) * 4096 >> 20)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='of glibc on Linux')
@pytest.mark.parametrize('keep', [True, False])
def test_what_is_freed_stays_with_the_process(keep):
  done = subprocess.run(
    [sys.executable, '-c', _SCRIPT, 'keep' if keep else 'leave'],
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
  assert (int(done.stdout) > 256) == keep
