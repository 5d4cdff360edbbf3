"""What a device can do at most: matrix products, its memory, the way to it."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def seconds(call: Callable[[], Any], rounds: int = 7, calls: int = 3) -> float:
  """Median seconds of a call, of which `calls` are in flight at a time."""
  jax.block_until_ready(call())
  taken = []
  for _ in range(rounds):
    start = time.perf_counter()
    results = [call() for _ in range(calls)]
    jax.block_until_ready(results)
    taken.append((time.perf_counter() - start) / calls)
  return statistics.median(taken)


def matmul_flops(size: int, dtype: str) -> float:
  """Operations a second in a product of two square matrices of random numbers."""
  make = lambda seed: jax.random.normal(jax.random.key(seed), (size, size), dtype)
  a, b = make(0), make(1)
  product = jax.jit(lambda a, b: a @ b)
  return 2 * size**3 / seconds(lambda: product(a, b))


def memory_bytes(megabytes: int) -> float:
  """Bytes read and written a second in a large copy on the device."""
  x = jax.random.uniform(jax.random.key(0), (megabytes * 2**18,), jnp.float32)
  copy = jax.jit(lambda x: x + 1.0)
  return 2 * x.nbytes / seconds(lambda: copy(x))


def host_to_device_bytes(megabytes: int) -> float:
  """Bytes a second of a NumPy array put onto the first device."""
  x = np.random.default_rng(0).integers(0, 255, megabytes << 20, np.uint8)
  device = jax.local_devices()[0]
  return x.nbytes / seconds(lambda: jax.device_put(x, device))
