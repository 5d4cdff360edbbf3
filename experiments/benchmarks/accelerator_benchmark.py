"""The learner's update on an accelerator, against what the device can do: JSON out.

  python -m experiments.benchmarks.accelerator_benchmark --torch_python VENV/bin/python

In one call: the device's ceilings; numerics (the gradient in bfloat16 against float32);
the update of the deep network with LSTM 256 on 72x96x3, T = 100, at each `--batches`,
from host memory and from the device's; its operations and bytes as XLA counts them, and
the time over what these need at least; V-trace's share; the same update in PyTorch in
turn. `--small` is for machines without an accelerator.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import ceilings, learner_benchmark, vtrace_benchmark
from impala_jax import config as config_lib
from impala_jax import losses
from impala_jax.learning import learner
from impala_jax.runtime import allocator, versions

_ACTION_REPEAT = 4


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--batches', default='32,128')
  parser.add_argument('--unroll', type=int, default=100)
  parser.add_argument('--dtype', default='bfloat16', choices=config_lib.DTYPES)
  parser.add_argument('--torch_python', help='one that has PyTorch with CUDA')
  parser.add_argument('--profile', help='a folder for a trace of three updates')
  parser.add_argument('--small', action='store_true', help='B = 2, T = 5')
  args = parser.parse_args()
  allocator.keep_memory()
  # PyTorch's process and the other of ours want a part of it.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  batches = [int(x) for x in args.batches.split(',')]
  if args.small:
    batches, args.unroll = [2], 5
  small = args.small
  size, megabytes = (512, 16) if small else (8192, 2048)
  result: dict[str, Any] = {
    'benchmark': 'accelerator',
    'device': jax.local_devices()[0].device_kind,
    'versions': versions.installed(),
    'ceilings': {
      'matmul_bfloat16_flops': ceilings.matmul_flops(size, 'bfloat16'),
      'matmul_float32_flops': ceilings.matmul_flops(size, 'float32'),
      'memory_bytes_per_second': ceilings.memory_bytes(megabytes),
      'host_to_device_bytes_per_second': ceilings.host_to_device_bytes(
        min(megabytes, 256)
      ),
    },
    'numerics': numerics(args.unroll, batches[0]),
  }
  result['updates'] = [update(args, batch, result['ceilings']) for batch in batches]
  result['vtrace'] = [vtrace_benchmark.measure(args.unroll, b) for b in batches]
  for one, trace in zip(result['updates'], result['vtrace'], strict=True):
    best = min(trace[m]['median_us'] for m in vtrace_benchmark.METHODS)
    one['vtrace_share'] = round(best / 1e3 / one['from_device_ms'], 5)
  if args.torch_python:
    result['beside_torch'] = [beside_torch(args, batch) for batch in batches]
  print(json.dumps(result, indent=1))
  return 0


def numerics(unroll: int, batch: int) -> dict[str, float]:
  """Error of the gradient of a bfloat16 torso against that of float32, by norms.

  Parameters, batch and the rest of the network are the same; random rewards.
  """
  found = {}
  for dtype in ('float32', 'bfloat16'):
    made, layout = learner_benchmark.make(arguments(unroll, batch, dtype))
    rows = jnp.asarray(learner_benchmark.random_rows(layout, batch, 0))
    loss_of = learner.objective(made.agent, losses.make_loss(config_lib.Loss()))
    params = made.agent.init(jax.random.key(0))
    (value, _), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(
      params, learner.time_major(layout.unpack(rows))
    )
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(gradient)]
    found[dtype] = float(value), leaves
  (exact, wanted), (value, got) = found['float32'], found['bfloat16']
  norm = lambda leaves: np.sqrt(sum((x**2).sum() for x in leaves))
  by_leaf = [norm([a - b]) / norm([b]) for a, b in zip(got, wanted, strict=True)]
  return {
    'loss_relative_error': abs(value - exact) / abs(exact),
    'gradient_relative_error': float(
      norm([a - b for a, b in zip(got, wanted, strict=True)]) / norm(wanted)
    ),
    'worst_leaf_relative_error': float(max(by_leaf)),
  }


def update(
  args: argparse.Namespace, batch: int, ceiling: dict[str, float]
) -> dict[str, Any]:
  """Times the update and sets it beside what the device needs at least."""
  made, layout = learner_benchmark.make(arguments(args.unroll, batch, args.dtype))
  rows = [learner_benchmark.random_rows(layout, batch, seed) for seed in range(3)]
  there = [made.put(r) for r in rows]
  state, count = made.init(0), 0

  def step(put: bool) -> Any:
    nonlocal state, count
    count += 1
    source = made.put(rows[count % 3]) if put else there[count % 3]
    state, _, figures = made.update(state, source)
    return figures

  from_host = ceilings.seconds(lambda: step(True), calls=5)
  from_device = ceilings.seconds(lambda: step(False), calls=5)
  if args.profile:
    with jax.profiler.trace(str(pathlib.Path(args.profile, f'batch-{batch}'))):
      jax.block_until_ready([step(True) for _ in range(3)])
  assert int(learner.to_host(state).skipped) == 0, 'a benchmark batch was refused'
  cost = made.cost(state, there[0])
  flops, moved = cost.get('flops', 0.0), cost.get('bytes accessed', 0.0)
  rate = ceiling[f'matmul_{args.dtype}_flops']
  floor = max(flops / rate, moved / ceiling['memory_bytes_per_second'])
  steps = batch * args.unroll
  return {
    'batch': batch,
    'from_host_ms': round(from_host * 1e3, 3),
    'from_device_ms': round(from_device * 1e3, 3),
    'agent_steps_per_second': round(steps / from_host),
    'frames_per_second': round(_ACTION_REPEAT * steps / from_host),
    'batch_megabytes': round(rows[0].nbytes / 2**20, 1),
    'flops': flops,
    'bytes': moved,
    'floor_ms': {
      'operations': round(1e3 * flops / rate, 3),
      'bytes': round(1e3 * moved / ceiling['memory_bytes_per_second'], 3),
      'transfer': round(
        1e3 * rows[0].nbytes / ceiling['host_to_device_bytes_per_second'], 3
      ),
    },
    'over_floor': round(from_device / floor, 2) if floor else None,
  }


def beside_torch(args: argparse.Namespace, batch: int) -> dict[str, Any]:
  """The same update by PyTorch, compiled, in turn with ours."""
  cuda = jax.default_backend() == 'gpu'
  command = [
    sys.executable, '-m', 'experiments.benchmarks.learner_comparison',
    f'--torch_python={args.torch_python}', '--torso=deep', '--hidden=256',
    '--lstm=256', '--frame=72,96,3', '--frame_stack=1', f'--unroll={args.unroll}',
    f'--batch={batch}', f'--dtype={args.dtype}', '--updates=5',
    f'--device={"cuda" if cuda else "cpu"}', *(['--compile'] if cuda else []),
  ]  # fmt: skip
  with tempfile.TemporaryFile('w+') as errors:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    errors.seek(0)
    if done.returncode:
      return {'batch': batch, 'failed': errors.read()[-2000:]}
  return {'batch': batch, **json.loads(done.stdout)}


def arguments(unroll: int, batch: int, dtype: str) -> argparse.Namespace:
  return learner_benchmark.parser().parse_args(
    [
      '--torso=deep',
      '--hidden=256',
      '--lstm=256',
      '--frame=72,96,3',
      '--frame_stack=1',
      f'--unroll={unroll}',
      f'--batch={batch}',
      f'--dtype={dtype}',
    ]
  )


if __name__ == '__main__':
  sys.exit(main())
