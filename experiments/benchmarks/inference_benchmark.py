"""The policy alone, on each platform and through a server: speed against batch size.

  python -m experiments.benchmarks.inference_benchmark --torso nature

Needs no environment, no Reverb and no accelerator; where JAX finds one, it is measured
beside the CPU. Random frames stand in for those of a game, and every step of a batch
begins unrolls as often as an actor's does. Prints one JSON object: agent steps/s and
CPU-seconds per 1,000 steps of the policy in a process of its own (on the CPU with one
thread, as launched actors have it), the same through a server with several clients, and
from which batch on an accelerator or a server costs less than the CPU.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import psutil

from experiments.benchmarks import children, inference_children, measure
from impala_jax import config as config_lib
from impala_jax.runtime import versions


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--torso', default='nature', choices=config_lib.TORSOS)
  parser.add_argument('--hidden', type=int, default=512)
  parser.add_argument('--lstm', type=int, default=0)
  parser.add_argument('--dtype', default='float32', choices=config_lib.DTYPES)
  parser.add_argument('--frame', type=int, default=84, help='pixels, square and grey')
  parser.add_argument('--batches', default='1,4,8,16,32,64,128,256')
  parser.add_argument('--platforms', default='', help="default: 'cpu' and JAX's own")
  parser.add_argument('--clients', default='1,2,4,8', help='numbers; empty for none')
  parser.add_argument('--envs', type=int, default=32, help='of each client')
  parser.add_argument('--max_batch', type=int, default=256, help="of the server's")
  parser.add_argument('--deadline_ms', type=float, default=2.0)
  parser.add_argument('--seconds', type=float, default=3.0, help='of each measurement')
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--child', default='', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.child:
    inference_children.run(args, args.child)
    return 0
  default = _ask(args, 'platform')['platform']
  names = [p for p in args.platforms.split(',') if p] or sorted({'cpu', default})
  local = {p: _ask(args, f'local={p}') for p in names}
  served = {p: _through(args, p) for p in names if args.clients}
  print(json.dumps({
      'benchmark': 'inference', 'arguments': vars(args), 'cores': os.cpu_count(),
      'local': local, 'server': served,
      'break_even': _break_even(local, served, args.envs),
      'versions': versions.installed(),
  }, indent=1))  # fmt: skip
  return 0


def _break_even(
  local: dict[str, Any], served: dict[str, Any], envs: int
) -> dict[str, Any]:
  """From where on another way costs less than the policy on one CPU thread.

  None where that never happened. For a platform: smallest batch with more steps/s, or
  less CPU time, than the CPU has at its own best batch. For a server: smallest number
  of clients of `envs` environments with less CPU time, server and clients together,
  than the CPU has for batches of `envs`; and by speed than as many CPU threads.
  """
  if 'cpu' not in local:
    return {}
  rows = local['cpu']['by_batch']
  rate = lambda row: row['steps_per_second']['median']
  cost = lambda row: row['cpu_seconds_per_1000_steps']['median']
  fastest, cheapest = max(map(rate, rows)), min(map(cost, rows))
  first = lambda found: next(iter(found), None)
  out: dict[str, Any] = {}
  for platform, entry in local.items():
    if platform != 'cpu':
      out[f'{platform}: batch, by speed'] = first(
        r['batch'] for r in entry['by_batch'] if rate(r) > fastest
      )
      out[f'{platform}: batch, by CPU time'] = first(
        r['batch'] for r in entry['by_batch'] if cost(r) < cheapest
      )
  near = min(rows, key=lambda r: abs(r['batch'] - envs))
  for platform, entry in served.items():
    out[f'server on {platform}: clients, by CPU time'] = first(
      r['clients'] for r in entry['by_clients'] if cost(r) < cost(near)
    )
    out[f'server on {platform}: clients, by speed against as many CPU threads'] = first(
      r['clients'] for r in entry['by_clients'] if rate(r) > r['clients'] * rate(near)
    )
  return out


def _through(args: argparse.Namespace, platform: str) -> dict[str, Any]:
  """A server on one platform with growing numbers of clients."""
  rows = []
  # The server has the machine as a server of a run has it: all threads.
  with _child(args, f'server={platform}') as server:
    address = server.hear()['address']
    watched = psutil.Process(server.pid)
    for count in map(int, args.clients.split(',')):
      with contextlib.ExitStack() as stack:
        clients = [
          stack.enter_context(_child(args, f'client={address}#{i}', cpu=True))
          for i in range(count)
        ]
        rounds = [_round(server, watched, clients) for _ in range(args.repeats)]
        for client in clients:
          client.tell()
      rows.append({'clients': count, **_summary(rounds, args.envs)})
  return {'envs_per_client': args.envs, 'by_clients': rows}


def _round(
  server: children.Child,
  watched: psutil.Process,
  clients: Sequence[children.Child],
) -> dict[str, float]:
  for client in clients:
    client.hear()
  before, cpu = _totals(server), _cpu(watched)
  for client in clients:
    client.tell()
  done = [client.hear() for client in clients]
  after, cpu = _totals(server), _cpu(watched) - cpu
  return {
    'requests': sum(d['count'] for d in done),
    'rate': sum(d['count'] / d['wall'] for d in done),
    'latency': sum(d['wall'] for d in done) / sum(d['count'] for d in done),
    'clients_cpu': sum(d['cpu'] for d in done),
    'server_cpu': cpu,
    **{k: after[k] - before[k] for k in after},
  }


def _summary(rounds: Sequence[dict[str, float]], envs: int) -> dict[str, Any]:
  column = lambda f, digits=4: measure.spread([f(r) for r in rounds], digits)
  per_1000 = lambda key: lambda r: 1e3 * r[key] / r['rows']
  return {
    'steps_per_second': column(lambda r: r['rate'] * envs, 0),
    'cpu_seconds_per_1000_steps': column(
      lambda r: 1e3 * (r['server_cpu'] + r['clients_cpu']) / r['rows']
    ),
    'of_the_clients': column(per_1000('clients_cpu')),
    'ms_per_request': column(lambda r: 1e3 * r['latency'], 2),
    'of_that_before_its_call': column(lambda r: 1e3 * r['waited'] / r['requests'], 2),
    'rows_per_batch': column(lambda r: r['rows'] / r['batches'], 1),
  }


def _child(args: argparse.Namespace, role: str, cpu: bool = False) -> children.Child:
  """This program in another role."""
  skipped = ('child',)
  flags = [f'--{k}={v}' for k, v in vars(args).items() if k not in skipped]
  environment: dict[str, str] = {}
  if cpu or role == 'local=cpu':
    environment |= {'JAX_PLATFORMS': 'cpu', 'NPROC': '1'}
  if role == 'server=cpu':
    environment['JAX_PLATFORMS'] = 'cpu'
  command = [sys.executable, '-m', __spec__.name, *flags, f'--child={role}']
  return children.Child(command, **environment)


def _ask(args: argparse.Namespace, role: str) -> dict[str, Any]:
  with _child(args, role) as child:
    return child.hear()


def _totals(server: children.Child) -> dict[str, float]:
  return {k: v for k, v in server.ask().items() if k != 'requests'}


def _cpu(process: psutil.Process) -> float:
  times = process.cpu_times()
  return times.user + times.system


if __name__ == '__main__':
  sys.exit(main())
