"""What the children of `inference_benchmark` do: the policy itself, servers, clients.

Each prints JSON objects, one a line, and ends when it is killed or has no more to do.
"""

import argparse
import contextlib
import json
import sys
import time
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import measure
from impala_jax import config as config_lib
from impala_jax import types
from impala_jax.acting import device_policy
from impala_jax.agents import agent as agent_lib
from impala_jax.distributed.inference import batcher as inference_batcher
from impala_jax.distributed.inference import connection as inference_connection
from impala_jax.distributed.inference import remote as remote_policy
from impala_jax.distributed.inference import server as inference_tcp
from impala_jax.distributed.roles import policies
from impala_jax.runtime import allocator

_ACTIONS = 18
_UNROLL = 20  # Steps; so often every environment begins one.


def run(args: argparse.Namespace, role: str) -> None:
  """`role` is name=value: platform, local=PLATFORM, server=PLATFORM, client=ADDRESS#I.

  Raises:
    config.ConfigError: there is no such platform.
  """
  allocator.keep_memory()  # As all roles of a run do.
  name, _, value = role.partition('=')
  work = {'platform': _platform, 'local': _local, 'server': _server, 'client': _client}
  work[name](args, value)


def _platform(args: argparse.Namespace, value: str) -> None:
  print(json.dumps({'platform': jax.default_backend()}))


def _local(args: argparse.Namespace, platform: str) -> None:
  """The policy in this process, for every batch size."""
  agent, spec = _make(args)
  device = device_policy.device_for(platform, 0, 'platforms')
  params = agent.init(jax.random.key(0))
  rows = []
  for batch in map(int, args.batches.split(',')):
    policy = device_policy.DevicePolicy(agent, batch, [batch], device=device)
    policy.set_parameters(0, params)
    policy.compile(spec)
    ids, action = np.arange(batch, dtype=np.int32), np.zeros(batch, np.int32)
    steps = _frames(spec, batch)

    def work(
      n: int,
      policy: device_policy.DevicePolicy = policy,
      ids: np.ndarray = ids,
      action: np.ndarray = action,
      steps: list[types.TimeStep] = steps,
    ) -> None:
      begins = ids % _UNROLL == n % _UNROLL
      policy.finish(policy.start(ids, steps[n % len(steps)], action, begins))

    rates, costs = [], []
    _repeat(work, args.seconds / 4)
    for _ in range(args.repeats):
      count, wall, cpu = _repeat(work, args.seconds)
      rates.append(count * batch / wall)
      costs.append(1e3 * cpu / (count * batch))
    rows.append(
      {
        'batch': batch,
        'steps_per_second': measure.spread(rates, 0),
        'cpu_seconds_per_1000_steps': measure.spread(costs),
        'ms_per_call': round(1e3 * batch / sorted(rates)[len(rates) // 2], 3),
      }
    )
  kind = (device or jax.devices()[0]).device_kind
  print(json.dumps({'device': kind, 'by_batch': rows}))


def _server(args: argparse.Namespace, platform: str) -> None:
  """A server, until its input ends; says its address, then totals when asked."""
  agent, spec = _make(args)
  device = device_policy.device_for(platform, 0, 'platforms')
  room = args.envs * max(map(int, args.clients.split(',')))
  policy = device_policy.DevicePolicy(
    agent, room, inference_batcher.batch_sizes(args.max_batch), device=device
  )
  policy.set_parameters(0, agent.init(jax.random.key(0)))
  policy.compile(spec)
  batcher = inference_batcher.Batcher(policy, room, 1e-3 * args.deadline_ms)
  server = inference_tcp.Server(batcher, policies.wire(agent, spec))
  print(json.dumps({'address': server.address}), flush=True)
  for _ in sys.stdin:
    print(json.dumps(vars(batcher.totals())), flush=True)
  server.close()
  batcher.close()


def _client(args: argparse.Namespace, value: str) -> None:
  """Steps as an actor does, without environments; a line of input starts the clock."""
  address, _, index = value.partition('#')
  agent, spec = _make(args)
  form = policies.wire(agent, spec)
  remote = remote_policy.RemotePolicy(
    [lambda: remote_policy.ServerAddress(address, 0)],
    lambda a: inference_connection.Connection(a, form),
    index,
    args.envs,
  )
  ids = np.arange(args.envs, dtype=np.int32)
  action, steps = np.zeros(args.envs, np.int32), _frames(spec, args.envs)
  work = lambda n: remote.act(
    ids, steps[n % len(steps)], action, ids % _UNROLL == n % _UNROLL
  )
  with contextlib.closing(remote):
    _repeat(work, 0.5)
    for _ in range(args.repeats):
      print(json.dumps({'ready': True}), flush=True)
      sys.stdin.readline()
      count, wall, cpu = _repeat(work, args.seconds)
      print(json.dumps({'count': count, 'wall': wall, 'cpu': cpu}), flush=True)
    sys.stdin.readline()


def _repeat(work: Any, seconds: float) -> tuple[int, float, float]:
  """(calls, wall seconds, CPU-seconds of this process)."""
  start, cpu, count = time.perf_counter(), time.process_time(), 0
  while (wall := time.perf_counter() - start) < seconds:
    work(count)
    count += 1
  return count, wall, time.process_time() - cpu


def _make(args: argparse.Namespace) -> tuple[agent_lib.Agent, types.EnvironmentSpec]:
  frame = types.ArraySpec((args.frame, args.frame, 1), np.dtype(np.uint8))
  spec = types.EnvironmentSpec(frame, _ACTIONS)
  network = config_lib.Network(
    torso=args.torso, hidden=args.hidden, lstm=args.lstm, dtype=args.dtype
  )
  return agent_lib.from_config(network, spec), spec


def _frames(spec: types.EnvironmentSpec, batch: int) -> list[types.TimeStep]:
  """Some time steps [batch, ...] of random pixels."""
  rng = np.random.default_rng(0)
  return [
    types.TimeStep(
      np.full(batch, types.StepType.MID, np.uint8),
      np.zeros(batch, np.float32),
      np.ones(batch, np.float32),
      rng.integers(256, size=(batch, *spec.observation.shape), dtype=np.uint8),
    )
    for _ in range(4)
  ]
