"""Many simulated actors against one learner host: what each costs, and who waits.

  python -m experiments.benchmarks.fleet_benchmark --clients=1000

The learner host is this process: both servers, the queue and its reader as in a run;
the update is replaced by a pause (`--update_ms`). Clients have an actor's writer and
its connection to the parameters, but no environment; unrolls are those of 100 steps of
DeepMind Lab (2.1 MB), parameters those of the shallow network with an LSTM. They send
`--rate` unrolls a second in all. They run as threads of a few processes.

Three windows: one in which each update publishes a version, one in which none does,
and one in which clients only report: so the cost of serving parameters can be told from
that of unrolls and of reports. Prints one JSON object, with what 250,000 frames a
second from 500 actors would need by these costs.
"""

import argparse
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import psutil

from experiments.benchmarks import (
  fleet_arithmetic,
  fleet_learner,
  measure,
  transport_benchmark,
)
from impala_jax import unroll_layout
from impala_jax.distributed.control import board, endpoints
from impala_jax.distributed.control import protocol as control_lib
from impala_jax.runtime import role_environment, versions

_CONNECT = 600.0  # Seconds for the first unroll of every client.
_LEAVE = 120.0


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--clients', type=int, default=1000)
  parser.add_argument('--transport', choices=['reverb', 'tcp'], default='reverb')
  parser.add_argument('--processes', type=int, default=4, help='that hold the clients')
  parser.add_argument('--rate', type=float, default=100.0, help='unrolls/s of all')
  parser.add_argument('--envs', type=int, default=4, help='that a client stands for')
  parser.add_argument('--seconds', type=float, default=60.0, help='of each window')
  parser.add_argument('--batch', type=int, default=32)
  parser.add_argument('--update_ms', type=float, default=0.0)
  args = parser.parse_args()
  if min(args.clients, args.processes, args.envs, args.batch) < 1:
    parser.error('--clients, --processes, --envs and --batch must be at least 1')
  if min(args.rate, args.seconds) <= 0 or args.update_ms < 0:
    parser.error('--rate and --seconds must be positive, --update_ms not negative')
  hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
  resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
  print(json.dumps(_measure(args), indent=1))
  return 0


def _measure(args: argparse.Namespace) -> dict[str, Any]:
  layout = transport_benchmark.layout('dmlab')
  params = fleet_learner.parameters()
  parameter_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
  control = board.Board()
  me = psutil.Process()
  here = role_environment.RoleEnvironment()
  with endpoints.serve(
    args.transport, layout, args.batch, 2 * args.batch, control, here
  ) as (reader, address):
    learner = fleet_learner.Learner(reader, control, params, args)
    _warm_up(args.transport, address, layout, 12 * args.batch, learner)
    before = _resources(me)
    started = time.monotonic()
    fleet = _start(args, address)
    try:
      _wait(
        lambda: bool(learner.accepted.all()), _CONNECT, 'to connect', learner, fleet
      )
      connected = time.monotonic() - started
      time.sleep(5.0)  # Until the crowd of the beginning has spread.
      after = _resources(me)
      busy = _window(args, learner, control, fleet)
      learner.publishes = False
      time.sleep(2.0 + args.clients * args.envs / args.rate)  # All have the last one.
      quiet = _window(args, learner, control, fleet)
      for process in fleet:
        process.send_signal(signal.SIGUSR1)
      time.sleep(5.0)
      silent = _window(args, learner, control, fleet)
      peak = measure.peak_rss_mb()
      client_mb = [p.memory_info().rss / 2**20 for p in map(_ps, fleet)]
      stopping = time.monotonic()
      control.stop()
      told = [p.communicate(timeout=_LEAVE)[0] for p in fleet]
      gone = time.monotonic() - stopping
    finally:
      for process in fleet:
        process.kill()
        process.wait()
      learner.close()
    stats = reader.stats()
    stopping = time.monotonic()
  closed = time.monotonic() - stopping
  costs = fleet_arithmetic.costs(
    _rates(busy),
    _rates(quiet),
    _rates(silent),
    reports=args.clients / fleet_arithmetic.REPORT_INTERVAL,
    unroll_bytes=layout.nbytes,
    parameter_bytes=parameter_bytes,
    descriptors=(after['descriptors'] - before['descriptors']) / args.clients,
  )
  answers = [json.loads(text) for text in told]
  return {
    'benchmark': 'fleet',
    'arguments': vars(args),
    'unroll_megabytes': round(layout.nbytes / 1e6, 3),
    'parameter_megabytes': round(parameter_bytes / 1e6, 3),
    'seconds_until_all_had_sent_one': round(connected, 1),
    'publishing': busy,
    'not_publishing': quiet,
    'only_reports': silent,
    'costs': {k: round(v, 3) for k, v in costs._asdict().items()},
    'learner_before': before,
    'learner_with_clients': after,
    'learner_peak_rss_mb': round(peak),
    'client_mb_each': round(sum(client_mb) / args.clients, 2),
    'unrolls': {'received': stats.received, 'lost': stats.lost,
                'duplicated': stats.duplicated, 'corrupted': stats.corrupted},
    'unrolls_late': sum(a['late'] for a in answers),
    'errors': [e for a in answers for e in a['errors']][:10],
    'seconds_to_stop_clients': round(gone, 1),
    'seconds_to_close_learner': round(closed, 1),
    'paper_250k_frames_per_second': [
      {k: round(v, 2) for k, v in fleet_arithmetic.at_scale(
          costs, learners=n, batch_size=args.batch).items()}
      for n in (1, 8)
    ],
    'versions': versions.installed(),
  }  # fmt: skip


def _window(
  args: argparse.Namespace,
  learner: fleet_learner.Learner,
  control: control_lib.Control,
  fleet: list[subprocess.Popen[str]],
) -> dict[str, Any]:
  accepted, updates, fetches = learner.accepted.copy(), learner.updates, control.fetches
  version, learner.lag = learner.version, []
  cpu, theirs, start = time.process_time(), _cpu(fleet), time.monotonic()
  while (left := start + args.seconds - time.monotonic()) > 0:
    _check(learner, fleet)
    time.sleep(min(left, 1.0))
  seconds = time.monotonic() - start
  cpu, theirs = time.process_time() - cpu, _cpu(fleet) - theirs
  dealt = learner.accepted - accepted
  unrolls = int(dealt.sum())
  lag = np.concatenate(learner.lag) if learner.lag else np.zeros(1)
  published = learner.version - version
  return {
    'seconds': round(seconds, 1),
    'unrolls': unrolls,
    'unrolls_per_second': round(unrolls / seconds, 1),
    'share_of_the_rate_asked_for': round(unrolls / seconds / args.rate, 3),
    'learner_cores': round(cpu / seconds, 4),
    'client_cores': round(theirs / seconds, 4),
    'updates': learner.updates - updates,
    'accepted_per_client': fleet_arithmetic.fairness(dealt.tolist()),
    'version_lag': {
      'mean': round(float(lag.mean()), 2),
      'p99': float(np.percentile(lag, 99)),
      'max': float(lag.max()),
    },
    'versions_published': published,
    'fetches': control.fetches - fetches,
    'fetches_per_version': round((control.fetches - fetches) / max(published, 1), 2),
  }


def _rates(window: dict[str, Any]) -> fleet_arithmetic.Window:
  return fleet_arithmetic.Window(
    window['learner_cores'],
    window['client_cores'],
    window['unrolls'] / window['seconds'],
    window['fetches'] / window['seconds'],
  )


def _warm_up(
  kind: str,
  address: dict[str, str],
  layout: unroll_layout.UnrollLayout,
  unrolls: int,
  learner: fleet_learner.Learner,
) -> None:
  """Uses all that the servers use once, so that it does not count as a client's."""
  with contextlib.closing(endpoints.open_control(address['control'])) as client:
    client.fetch(-1)
  with endpoints.open_writer(kind, address['transport'], layout) as writer:
    transport_benchmark.send(writer, layout, unrolls, 'smooth')
  deadline = time.monotonic() + 60.0
  while learner.accepted.sum() < unrolls and time.monotonic() < deadline:
    time.sleep(0.1)
  learner.accepted[:] = 0


def _start(
  args: argparse.Namespace, address: dict[str, str]
) -> list[subprocess.Popen[str]]:
  shares = np.array_split(np.arange(args.clients), min(args.processes, args.clients))
  return [
    subprocess.Popen(
        [sys.executable, '-m', 'experiments.benchmarks.fleet_clients', json.dumps({
            'transport': args.transport, 'address': address,
            'first': int(share[0]), 'count': len(share),
            'period': args.clients / args.rate, 'envs': args.envs,
        })],
        stdout=subprocess.PIPE, text=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    )
    for share in shares
  ]  # fmt: skip


def _wait(
  condition: Any,
  seconds: float,
  what: str,
  learner: fleet_learner.Learner,
  fleet: list[subprocess.Popen[str]],
) -> None:
  deadline = time.monotonic() + seconds
  while not condition():
    _check(learner, fleet)
    if time.monotonic() > deadline:
      done = int((learner.accepted > 0).sum())
      raise SystemExit(f'{what} took more than {seconds:.0f} s; {done} clients did')
    time.sleep(0.1)


def _check(learner: fleet_learner.Learner, fleet: list[subprocess.Popen[str]]) -> None:
  if learner.failure is not None:
    raise SystemExit(f'the learner failed: {learner.failure}')
  if any(p.poll() is not None for p in fleet):
    raise SystemExit('a process of clients has ended; its errors are above')


def _resources(process: psutil.Process) -> dict[str, float]:
  return {
    'rss_mb': round(process.memory_info().rss / 2**20, 1),
    'descriptors': process.num_fds(),
    'threads': process.num_threads(),
  }


def _ps(process: subprocess.Popen[str]) -> psutil.Process:
  return psutil.Process(process.pid)


def _cpu(fleet: list[subprocess.Popen[str]]) -> float:
  return sum(sum(p.cpu_times()[:2]) for p in map(_ps, fleet))


if __name__ == '__main__':
  sys.exit(main())
