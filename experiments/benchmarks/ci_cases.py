"""The short benchmarks that a CI job compares with a baseline.

Each case is set up once and then does the same work whenever it is called; what it
costs is compared with a reference, work that no change to this package alters. There
are three, because machines differ in each: what one gains by AVX-512 in arithmetic it
does not gain in memory or in the interpreter.
"""

import importlib.util
import threading
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import (
  actor_benchmark,
  learner_benchmark,
  transport_benchmark,
)
from impala_jax import components, vtrace
from impala_jax import config as config_lib
from impala_jax.acting import actor as actor_lib
from impala_jax.acting import policy as policy_lib
from impala_jax.distributed.transport import local as local_transport
from impala_jax.distributed.transport import protocol as transport

Work = Callable[[], None]


class Case(NamedTuple):
  """A piece of work.

  Attributes:
    about: what it is, for people.
    set_up: compiles and allocates; returns the work and what gives all up again.
    reference: what bounds it most on a machine.
    available: whether it can run here.
  """

  about: str
  set_up: Callable[[], tuple[Work, Work]]
  reference: Work
  available: Callable[[], bool] = lambda: True


def arithmetic() -> None:
  """Products of matrices by XLA, in the vector instructions that there are."""
  for _ in range(8):
    jax.block_until_ready(_PRODUCT(_MATRIX))


def memory() -> None:
  """Copies of what no cache holds."""
  for _ in range(4):
    np.copyto(_TO, _FROM)


def interpreter() -> None:
  """Python's loop, and a sort that has no vector instructions."""
  total = 0
  for i in range(200_000):
    total += i & 3
  sorted(_NUMBERS)


_PRODUCT = jax.jit(lambda x: x @ x)
_MATRIX = np.random.default_rng(0).random((640, 640), np.float32)
_NUMBERS = np.random.default_rng(0).random(20_000).tolist()
_FROM, _TO = np.ones((2, 1 << 24), np.uint8)


def _learner(torso: str, batch: int, updates: int) -> tuple[Work, Work]:
  arguments = ['--torso', torso, '--batch', str(batch)]
  options = learner_benchmark.parser().parse_args(arguments)
  learner, layout = learner_benchmark.make(options)
  rows = learner_benchmark.random_rows(layout, batch, 0)
  state = learner.init(0)

  def work() -> None:
    nonlocal state
    for _ in range(updates):
      state, _, figures = learner.update(state, learner.put(rows))
    jax.block_until_ready(figures)

  return work, lambda: None


def _vtrace() -> tuple[Work, Work]:
  rng = np.random.default_rng(0)
  draw = lambda: jnp.asarray(rng.normal(size=(100, 32)), jnp.float32)
  arguments = (draw(), jnp.full((100, 32), 0.99), draw(), draw(), draw())
  call = jax.jit(vtrace.vtrace)

  def work() -> None:
    for _ in range(200):
      found = call(*arguments)
    jax.block_until_ready(found)

  return work, lambda: None


def _actor() -> tuple[Work, Work]:
  """An actor whose environments and network cost next to nothing."""
  parts = components.build(
    config_lib.override(
      config_lib.Config(),
      [
        'environment.suite=catch',
        'environment.levels=catch',
        'network.torso=mlp',
        'network.hidden=16',
        'network.frame_stack=1',
        'actor.envs_per_actor=16',
      ],
    )
  )
  queue = local_transport.LocalTransport(parts.layout, 8, 64)
  threading.Thread(target=actor_benchmark.empty, args=(queue,), daemon=True).start()
  environments = parts.make_environments(0)
  params = jax.tree.map(np.asarray, parts.agent.init(jax.random.key(0)))
  length = parts.config.actor.unroll_length
  policy = policy_lib.Local(
    parts.agent,
    actor_benchmark.Constant(params),
    environments.num_envs,
    unroll_length=length,
  )
  actor = actor_lib.Actor(
    policy, environments, parts.layout, queue.writer(), unroll_length=length
  )

  def end() -> None:
    queue.close()
    environments.close()

  return lambda: actor.run(max_unrolls=16), end


def _through(reader: transport.Reader, writer: transport.Writer) -> tuple[Work, Work]:
  batches, size = 4, 4
  sequence = 0
  form = transport_benchmark.layout('dmlab')
  rows = transport_benchmark.make_rows(form, 'smooth')

  def work() -> None:
    nonlocal sequence
    for _ in range(batches):
      for row in rows[:size]:
        form.seal(row, actor_id=0, incarnation=0, sequence=sequence, version=0)
        writer.write(row, 60.0)
        sequence += 1
      reader.read(60.0).release()

  def end() -> None:
    writer.close()
    reader.close()

  return work, end


def _local() -> tuple[Work, Work]:
  queue = local_transport.LocalTransport(transport_benchmark.layout('dmlab'), 4, 8)
  return _through(queue, queue.writer())


def _network(kind: str) -> tuple[Work, Work]:
  form = transport_benchmark.layout('dmlab')
  make_reader, make_writer = transport_benchmark.network(kind)
  reader = make_reader(form, 4, 8)
  return _through(reader, make_writer(reader.address, form))


CASES = {
  'learner_shallow': Case(
    'update of the shallow network, 4 unrolls of 20',
    lambda: _learner('nature', 4, 2),
    arithmetic,
  ),
  'learner_deep': Case(
    'update of the deep network, 2 unrolls of 20',
    lambda: _learner('deep', 2, 1),
    arithmetic,
  ),
  'vtrace': Case('V-trace of 32 unrolls of 100, 200 times', _vtrace, interpreter),
  'actor': Case('an actor on 16 games of Catch, 16 unrolls', _actor, interpreter),
  'local': Case('16 unrolls of 2.1 MB through the local queue', _local, memory),
  'reverb': Case(
    '16 unrolls of 2.1 MB through Reverb',
    lambda: _network('reverb'),
    interpreter,
    lambda: importlib.util.find_spec('reverb') is not None,
  ),
  'tcp': Case(
    '16 unrolls of 2.1 MB through the TCP transport', lambda: _network('tcp'), memory
  ),
}
