"""What one unroll costs on its way from an actor to the learner.

  python -m experiments.benchmarks.transport_benchmark --transports reverb tcp

Three sizes of unrolls: `dmlab`, 100 steps of DeepMind Lab (101 frames of 72 x 96 x 3,
2.1 MB); `atari`, 20 steps of Atari (84 x 84 frames, 150 kB); `vector`, 20 steps of 16
numbers (2 kB). Two synthetic contents: `smooth`, gradients that scroll with a 24 x 24
sprite of noise moving over them, which compresses well; `noise`, random bytes, which
does not compress at all. How well real frames compress was not compared.

Transports are measured in turn, each round in processes of its own. Prints one JSON
object. CPU times are those of the whole process divided by the
unrolls: `read` holds the server and verifies checksums, `write` is a process of
its own (for `local`, reader and writer are threads of one process). Sealing a row
is the actor's work and left out.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np

from impala_jax import types, unroll_layout
from impala_jax.distributed.security import keys as run_keys
from impala_jax.distributed.transport import local as local_transport
from impala_jax.distributed.transport import protocol as transport
from impala_jax.runtime import versions

# Shape and dtype of an observation, steps, and size of the recurrent state.
_SIZES: dict[str, tuple[tuple[int, ...], type, int, int]] = {
  'dmlab': ((72, 96, 3), np.uint8, 100, 256),
  'atari': ((84, 84, 1), np.uint8, 20, 0),
  'vector': ((16,), np.float32, 20, 0),
}
_SPRITE = 24
_TRANSPORTS = ('local', 'reverb', 'tcp')
_DISTINCT = 4  # Different unrolls that are sent in turn.
# What is measured in a process of its own, and what writes to it.
_OURS = [sys.executable, '-m', 'experiments.benchmarks.transport_benchmark']


def layout(size: str) -> unroll_layout.UnrollLayout:
  shape, dtype, steps, state = _SIZES[size]
  part = types.ArraySpec((state,), np.dtype(np.float32))
  return unroll_layout.UnrollLayout(
    unroll_layout.unroll_spec(
      types.EnvironmentSpec(types.ArraySpec(shape, np.dtype(dtype)), num_actions=9),
      agent_state=(part, part) if state else (),
      unroll_length=steps,
    )
  )


def make_rows(form: unroll_layout.UnrollLayout, content: str) -> np.ndarray:
  """Unsealed rows uint8 [_DISTINCT, nbytes]."""
  rng = np.random.default_rng(0)
  rows = form.allocate(_DISTINCT)
  rows[:] = 0
  if content == 'noise':
    observation = form.views(rows).timestep.observation
    observation[:] = rng.integers(0, 256, observation.shape, dtype=np.uint8)
    return rows
  for row in rows:
    views = form.views(row)
    if views.timestep.observation.ndim == 4:
      _draw(views.timestep.observation, rng)
    else:
      views.timestep.observation[...] = rng.normal(
        size=views.timestep.observation.shape
      )
    views.timestep.reward[...] = rng.random(views.timestep.reward.shape)
    views.behaviour_log_prob[...] = -rng.random(views.behaviour_log_prob.shape)
    for state in views.agent_state:
      state[...] = rng.normal(size=state.shape)
  return rows


def _draw(frames: np.ndarray, rng: np.random.Generator) -> None:
  _, height, width, channels = frames.shape
  y, x = np.mgrid[0:height, 0:width]
  room = np.stack([1.2 * x + 40, 1.5 * y + 30, 0.7 * (x + y) + 60], -1)
  sprite = rng.integers(0, 256, (_SPRITE, _SPRITE, channels), dtype=np.uint8)
  start = int(rng.integers(width))
  for t, frame in enumerate(frames):
    frame[...] = np.roll(room[..., :channels], start + t, axis=1)
    i, j = 7 * t % (height - _SPRITE), 5 * t % (width - _SPRITE)
    frame[i : i + _SPRITE, j : j + _SPRITE] = sprite


def send(
  writer: transport.Writer, form: unroll_layout.UnrollLayout, number: int, content: str
) -> None:
  """Seals and writes `number` unrolls."""
  rows = make_rows(form, content)
  for i in range(number):
    row = rows[i % _DISTINCT]
    form.seal(row, actor_id=0, incarnation=0, sequence=i, version=0)
    writer.write(row, 60.0)


def receive(reader: transport.Reader, number: int) -> tuple[float, float]:
  """CPU seconds of this process and wall seconds for `number` unrolls."""
  cpu, wall = time.process_time(), time.perf_counter()
  for _ in range(number):
    batch = reader.read(60.0)
    batch.release()
  return time.process_time() - cpu, time.perf_counter() - wall


def bench_local(args: argparse.Namespace) -> dict:
  form, batch = layout(args.size), args.batch
  batches, repeats = -(-args.unrolls // batch), args.repeats
  queue = local_transport.LocalTransport(form, batch, 2 * batch)
  warm_up = 8  # Until every slab was used.
  total = (warm_up + batches * repeats) * batch
  thread = threading.Thread(
    target=send, args=(queue.writer(), form, total, args.content), daemon=True
  )
  thread.start()
  receive(queue, warm_up)
  cpu, wall = _repeat(queue, batch, batches, repeats)
  thread.join(60.0)
  seal = _seal_ms(form)
  queue.close()
  return {
    'read_and_write_cpu_ms_per_unroll': _spread([ms - seal for ms in cpu]),
    'seal_cpu_ms_per_unroll_left_out': seal,
    'wall_ms_per_unroll': _spread(wall),
    'peak_rss_mb': _peak_rss_mb(),
  }


def network(kind: str) -> tuple[Any, Any]:
  """The classes of reader and writer of a transport between processes."""
  if kind == 'reverb':
    from impala_jax.distributed.transport import reverb

    return reverb.ReverbReader, reverb.ReverbWriter
  from impala_jax.distributed.transport import tcp

  return tcp.TcpReader, tcp.TcpWriter


def _security(args: argparse.Namespace, name: str) -> dict[str, Any]:
  return {'keys': run_keys.load(pathlib.Path(args.keys), name)} if args.keys else {}


def bench_network(args: argparse.Namespace) -> dict:
  form, batch = layout(args.size), args.batch
  batches, repeats = -(-args.unrolls // batch), args.repeats
  make, _ = network(args.transport)
  reader = make(form, batch, 2 * batch, **_security(args, run_keys.LEARNER))
  warm_up = 2
  # The writer measures over all but its first batches; the queue keeps some.
  total = (warm_up + batches * repeats + 3) * batch
  writer = subprocess.Popen(
    [
      *_OURS,
      *_flags(args),
      f'--transport={args.transport}',
      f'--write_to={reader.address}',
      f'--unrolls={total}',
    ],
    stdout=subprocess.PIPE,
    text=True,
  )
  with contextlib.closing(reader):
    try:
      receive(reader, warm_up)
      cpu, wall = _repeat(reader, batch, batches, repeats)
      receive(reader, 3)
      output = writer.communicate(timeout=60)[0]
    finally:
      writer.kill()
  return {
    'read_cpu_ms_per_unroll': _spread(cpu),
    'wall_ms_per_unroll': _spread(wall),
    'peak_rss_mb': _peak_rss_mb(),
    **json.loads(output),
  }


def run_writer(args: argparse.Namespace) -> dict:
  """The writing process of `bench_network`."""
  form, batch = layout(args.size), args.batch
  _, make = network(args.transport)
  writer = make(args.write_to, form, **_security(args, run_keys.CLIENT))
  rows = make_rows(form, args.content)
  figures = []
  with contextlib.closing(writer):
    mark = time.process_time()
    for i in range(args.unrolls):
      row = rows[i % _DISTINCT]
      form.seal(row, actor_id=0, incarnation=0, sequence=i, version=0)
      writer.write(row, 60.0)
      if (i + 1) % batch == 0:
        now = time.process_time()
        figures.append((now - mark) / batch * 1e3)
        mark = now
  seal = _seal_ms(form)
  return {
    'write_cpu_ms_per_unroll': _spread([ms - seal for ms in figures[2:]]),
    'seal_cpu_ms_per_unroll_left_out': seal,
    'writer_peak_rss_mb': _peak_rss_mb(),
  }


def _repeat(
  reader: transport.Reader, batch: int, batches: int, repeats: int
) -> tuple[list[float], list[float]]:
  """CPU and wall milliseconds per unroll of each repeat."""
  figures = [receive(reader, batches) for _ in range(repeats)]
  scale = 1e3 / (batches * batch)
  return [cpu * scale for cpu, _ in figures], [wall * scale for _, wall in figures]


def _seal_ms(form: unroll_layout.UnrollLayout) -> float:
  row = make_rows(form, 'noise')[0]
  before = time.process_time()
  for i in range(200):
    form.seal(row, actor_id=0, incarnation=0, sequence=i, version=0)
  return round((time.process_time() - before) / 200 * 1e3, 4)


def _spread(values: list[float]) -> dict[str, float]:
  return {
    'median': round(statistics.median(values), 3),
    'min': round(min(values), 3),
    'max': round(max(values), 3),
  }


def _peak_rss_mb() -> float:
  # `ru_maxrss` would begin with the peak of the parent process.
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith('VmHWM'):
      return round(int(line.split()[1]) / 1024, 1)
  raise RuntimeError('no VmHWM in /proc/self/status')


def _flags(args: argparse.Namespace) -> list[str]:
  return [
    f'--{name}={getattr(args, name)}'
    for name in ('size', 'content', 'batch', 'repeats', 'keys')
  ]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--transports', nargs='+', choices=_TRANSPORTS, default=list(_TRANSPORTS)
  )
  parser.add_argument('--size', choices=sorted(_SIZES), default='dmlab')
  parser.add_argument('--content', choices=['smooth', 'noise'], default='smooth')
  parser.add_argument('--unrolls', type=int, default=300, help='per repeat')
  parser.add_argument('--batch', type=int, default=32)
  parser.add_argument('--repeats', type=int, default=3, help='in each round')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--keys', default='', help="folder of a run's keys, for tcp")
  parser.add_argument('--transport', choices=_TRANSPORTS, help=argparse.SUPPRESS)
  parser.add_argument('--write_to', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if min(args.unrolls, args.batch, args.repeats, args.rounds) < 1:
    parser.error('--unrolls, --batch, --repeats and --rounds must be at least 1')
  if args.write_to:
    print(json.dumps(run_writer(args)))
    return
  if args.transport:
    bench = bench_local if args.transport == 'local' else bench_network
    print(json.dumps(bench(args)))
    return
  rounds: dict[str, list[dict]] = {kind: [] for kind in args.transports}
  for _ in range(args.rounds):
    for kind in args.transports:
      command = [*_OURS, *_flags(args), f'--unrolls={args.unrolls}']
      done = subprocess.run(
        [*command, f'--transport={kind}'], check=True, capture_output=True, text=True
      )
      rounds[kind].append(json.loads(done.stdout))
  print(
    json.dumps(
      {
        'unroll_bytes': layout(args.size).nbytes,
        **{k: v for k, v in vars(args).items() if v and k != 'transports'},
        'versions': versions.installed(),
        'transports': {kind: _joined(found) for kind, found in rounds.items()},
      },
      indent=2,
    )
  )


def _joined(rounds: list[dict]) -> dict:
  """Of several rounds: the spread of their medians, or of their numbers."""
  return {
    key: _spread(
      [r[key]['median'] if isinstance(r[key], dict) else r[key] for r in rounds]
    )
    for key in rounds[0]
  }


if __name__ == '__main__':
  main()
