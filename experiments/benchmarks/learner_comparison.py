"""One update of the learner against the same in PyTorch, in turn: JSON out.

  python -m experiments.benchmarks.learner_comparison --torch_python VENV/bin/python \
    --torso deep --hidden 256

Two processes that wait while the other works; `--cores 0` pins both to one core. With
`--without onednn` a third is ours by XLA's own convolutions.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import sys
from typing import Any

from experiments.benchmarks import children, measure

_HERE = pathlib.Path(__file__).parent


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--torch_python', required=True, help='one that has PyTorch')
  parser.add_argument('--torso', default='nature', choices=['nature', 'deep'])
  parser.add_argument('--hidden', type=int, default=512)
  parser.add_argument('--lstm', type=int, default=0)
  parser.add_argument('--frame', default='84,84,1', help='height,width,channels')
  parser.add_argument('--frame_stack', type=int, default=4)
  parser.add_argument('--unroll', type=int, default=20)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--updates', type=int, default=2, help='per round')
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
  parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
  parser.add_argument('--compile', action='store_true', help='torch.compile')
  parser.add_argument('--cores', default='', help='as 0 or 0,1: pin to these')
  parser.add_argument('--without', choices=['onednn'], help='another one of ours')
  args = parser.parse_args()
  if args.cores:
    os.sched_setaffinity(0, [int(core) for core in args.cores.split(',')])
  same = [
    f'--{name}={getattr(args, name)}'
    for name in ('torso', 'hidden', 'lstm', 'unroll', 'batch', 'updates', 'dtype')
  ]
  ours = [
    sys.executable, '-m', 'experiments.benchmarks.learner_benchmark', '--serve',
    f'--frame={args.frame}', f'--frame_stack={args.frame_stack}', *same,
  ]  # fmt: skip
  height, width, channels = (int(x) for x in args.frame.split(','))
  theirs = [
    args.torch_python,
    str(_HERE / 'torch_learner.py'),
    f'--device={args.device}',
    f'--frame={height},{width},{channels * args.frame_stack}',
    *same,
  ]
  if args.compile:
    theirs.append('--compile')
  commands: dict[str, tuple[list[str], dict[str, str]]] = {'impala_jax': (ours, {})}
  if args.without:
    commands['impala_jax without onednn'] = (ours, {'IMPALA_JAX_ONEDNN': 'off'})
  commands['torch'] = (theirs, {})
  with contextlib.ExitStack() as stack:
    side = {
      # So that two processes fit on one GPU.
      name: stack.enter_context(
        children.Child(command, XLA_PYTHON_CLIENT_PREALLOCATE='false', **env)
      )
      for name, (command, env) in commands.items()
    }
    installed = {name: child.hear()['versions'] for name, child in side.items()}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in side}
    for _ in range(args.rounds):
      for name, child in side.items():
        rounds[name].append(child.ask())
  steps = args.batch * args.unroll
  result: dict[str, Any] = {
    'benchmark': 'learner_comparison',
    'arguments': vars(args),
    'load': os.getloadavg(),
  }
  for name, found in rounds.items():
    column = lambda key, found=found: [r[key] for r in found]
    result[name] = {
      'update_ms': measure.spread(column('update_ms'), 1),
      'update_cpu_ms': measure.spread(column('update_cpu_ms'), 1),
      'agent_steps_per_second': round(
        1e3 * steps / statistics.median(column('update_ms'))
      ),
      'peak_rss_mb': round(found[-1]['peak_rss_mb']),
      'versions': installed[name],
    }
  mine, other = (rounds[name] for name in ('impala_jax', 'torch'))
  for key in ('update_ms', 'update_cpu_ms'):
    ratios = [b[key] / a[key] for a, b in zip(mine, other, strict=True)]
    result[f'torch_over_impala_jax_{key}'] = measure.spread(ratios, 2)
  print(json.dumps(result, indent=1))
  return 0


if __name__ == '__main__':
  sys.exit(main())
