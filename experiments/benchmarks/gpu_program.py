"""What XLA makes of the learner's update for a GPU that is not there: JSON out.

  python -m pip install "jax[cuda12]==VERSION"   # The version that is installed.
  python -m experiments.benchmarks.gpu_program --batch 128

Compiles the update of `accelerator_benchmark` ahead of time and counts the kernels that
would be launched, the bytes that they would read and write (operands and results of
each; caches and what a kernel skips do not count) and the memory needed. Nothing runs,
so convolutions and products are not tuned. `--gpu` names a description of the GPU as
XLA's GpuTargetConfigProto in text form; without it the GPU is an H200.
"""

import argparse
import collections
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from experiments.benchmarks import accelerator_benchmark, learner_benchmark
from impala_jax import config as config_lib
from impala_jax import losses, optimizers
from impala_jax.learning import learner
from impala_jax.runtime import versions

_H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000
  device_memory_size: 151397597184
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
_BITS = {
  'pred': 8,
  'bf16': 16,
  **{f'{k}{n}': n for k in 'suf' for n in (8, 16, 32, 64)},
}
# Of an optimised module in text: a computation's first line, an instruction.
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.-]+) \(.*\{$')
_INSTRUCTION = re.compile(r' +(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)')
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')
_NO_KERNEL = frozenset(
  ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'fusion-done')
)


class Kernel(NamedTuple):
  """One instruction that is a kernel, and what its launches touch together."""

  launches: int
  gigabytes: float
  opcode: str
  result: str  # Types and shapes.
  source: str  # Where in the program it comes from.


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--batch', type=int, default=128)
  parser.add_argument('--unroll', type=int, default=100)
  parser.add_argument('--dtype', default='bfloat16', choices=config_lib.DTYPES)
  parser.add_argument('--gpu', help='a file with the description of the GPU')
  parser.add_argument('--hlo', help='a file for the compiled program')
  parser.add_argument('--top', type=int, default=20)
  args = parser.parse_args()
  gpu = pathlib.Path(args.gpu).read_text() if args.gpu else _H200
  compiled = _compile(args, gpu)
  text = compiled.as_text()
  if args.hlo:
    pathlib.Path(args.hlo).write_text(text)
  found = sorted(kernels(text), key=lambda k: -k.gigabytes)
  memory = compiled.memory_analysis()
  print(json.dumps({
    'benchmark': 'gpu_program',
    'arguments': vars(args),
    'kernels': sum(k.launches for k in found),
    'gigabytes': round(sum(k.gigabytes for k in found), 2),
    'temporary_memory_gb': round(memory.temp_size_in_bytes / 1e9, 2),
    'largest': [k._asdict() for k in found[: args.top]],
    'versions': versions.installed(),
  }, indent=1))  # fmt: skip
  return 0


def _compile(args: argparse.Namespace, gpu: str) -> Any:
  # JAX's plugin would look for a driver, and not be there without one.
  os.environ['JAX_SKIP_CUDA_CONSTRAINTS_CHECK'] = '1'
  try:
    topology = topologies.get_topology_desc(
      '', 'cuda', target_config=gpu, topology='1x1x1'
    )
  except Exception as e:
    raise SystemExit(
      f'no compiler for CUDA: {str(e)[:300]}\nIt comes with jax[cuda12] or '
      f'jax[cuda13], in the version of JAX that is installed ({jax.__version__}).'
    ) from e
  made, layout = learner_benchmark.make(
    accelerator_benchmark.arguments(args.unroll, args.batch, args.dtype)
  )
  config = config_lib.Config()
  update = learner.make_update(
    made.agent, losses.make_loss(config.loss), optimizers.make_optimizer(config), layout
  )
  mesh = jax.sharding.Mesh(np.array(topology.devices), ('device',))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  state, rows = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    (made.template(), jax.ShapeDtypeStruct((args.batch, layout.nbytes), jnp.uint8)),
  )
  # The network asks at trace time.
  with mock.patch.object(jax, 'default_backend', return_value='gpu'):
    return jax.jit(update, donate_argnums=0).lower(state, rows).compile()


def kernels(text: str) -> list[Kernel]:
  """Of the entry computation of an optimised module in text form.

  A loop whose number of rounds XLA knows counts as often, any other once. Of an array
  that has an element for each round, as the outputs of a scan, one is counted.
  """
  computations: dict[str, list[tuple[str, ...]]] = collections.defaultdict(list)
  name = entry = ''
  for line in text.splitlines():
    if (start := _COMPUTATION.match(line)) is not None:
      name = start[2]
      entry = name if start[1] else entry
    elif (instruction := _INSTRUCTION.match(line)) is not None:
      computations[name].append(instruction.groups())
  return list(_walk(computations, entry, 1))


def _walk(
  computations: dict[str, list[tuple[str, ...]]], name: str, rounds: int
) -> Iterator[Kernel]:
  shapes = {result: shape for result, shape, *_ in computations[name]}
  for _, shape, opcode, rest in computations[name]:
    if opcode == 'while':
      body = re.search(r'body=%?([\w.-]+)', rest)
      count = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
      assert body is not None
      yield from _walk(computations, body[1], rounds * int(count[1] if count else 1))
    elif opcode not in _NO_KERNEL:
      operands = re.findall(r'%([\w.-]+)', rest.split('), ')[0])
      touched = [shape, *(shapes[o] for o in operands if o in shapes)]
      source = re.search(r'op_name="([^"]*)"', rest)
      gigabytes = rounds * sum(_nbytes(s, rounds) for s in touched) / 1e9
      yield Kernel(
        rounds, round(gigabytes, 4), opcode, shape, source[1] if source else ''
      )


def _nbytes(shape: str, rounds: int) -> float:
  total = 0.0
  for dtype, sizes in _ARRAY.findall(shape):
    dimensions = [int(n) for n in sizes.split(',') if n]
    if rounds > 1 and dimensions[:1] == [rounds]:
      dimensions = dimensions[1:]
    total += math.prod(dimensions) * _BITS.get(dtype, 0) / 8
  return total


if __name__ == '__main__':
  sys.exit(main())
