"""What one unroll costs on its way from an actor to the learner.

  python -m experiments.benchmarks.transport_benchmark --transport both

Each unroll is that of 100 steps of DeepMind Lab (101 frames of 72 x 96 x 3, 2.1 MB).
Two synthetic contents: `smooth`, gradients that scroll with a 24 x 24 sprite of noise
moving over them, which compresses well; `noise`, random bytes, which does not
compress at all. How well real frames compress was not compared.

Prints one JSON object. CPU times are those of the whole process divided by the
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

import numpy as np

from impala_jax import types, unroll_layout
from impala_jax.distributed.transport import local as local_transport
from impala_jax.distributed.transport import protocol as transport
from impala_jax.runtime import versions

_HEIGHT, _WIDTH, _STEPS = 72, 96, 100
_SPRITE = 24
_DISTINCT = 4  # Different unrolls that are sent in turn.


def layout() -> unroll_layout.UnrollLayout:
  state = types.ArraySpec((256,), np.dtype(np.float32))
  return unroll_layout.UnrollLayout(
    unroll_layout.unroll_spec(
      types.EnvironmentSpec(
        types.ArraySpec((_HEIGHT, _WIDTH, 3), np.dtype(np.uint8)), num_actions=9
      ),
      agent_state=(state, state),
      unroll_length=_STEPS,
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
  y, x = np.mgrid[0:_HEIGHT, 0:_WIDTH]
  room = np.stack([1.2 * x + 40, 1.5 * y + 30, 0.7 * (x + y) + 60], -1)
  for row in rows:
    views = form.views(row)
    sprite = rng.integers(0, 256, (_SPRITE, _SPRITE, 3), dtype=np.uint8)
    start = int(rng.integers(_WIDTH))
    for t, frame in enumerate(views.timestep.observation):
      frame[...] = np.roll(room, start + t, axis=1)
      i, j = 7 * t % (_HEIGHT - _SPRITE), 5 * t % (_WIDTH - _SPRITE)
      frame[i : i + _SPRITE, j : j + _SPRITE] = sprite
    views.timestep.reward[...] = rng.random(_STEPS + 1)
    views.behaviour_log_prob[...] = -rng.random(_STEPS)
    for state in views.agent_state:
      state[...] = rng.normal(size=state.shape)
  return rows


def send(writer: transport.Writer, number: int, content: str) -> None:
  """Seals and writes `number` unrolls."""
  form = layout()
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


def bench_local(batch: int, batches: int, repeats: int, content: str) -> dict:
  form = layout()
  queue = local_transport.LocalTransport(form, batch, 2 * batch)
  warm_up = 8  # Until every slab was used.
  total = (warm_up + batches * repeats) * batch
  thread = threading.Thread(
    target=send, args=(queue.writer(), total, content), daemon=True
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


def bench_reverb(batch: int, batches: int, repeats: int, content: str) -> dict:
  from impala_jax.distributed.transport import reverb as reverb_transport

  reader = reverb_transport.ReverbReader(layout(), batch, 2 * batch)
  warm_up = 2
  # The writer measures over all but its first batches; the queue keeps some.
  total = (warm_up + batches * repeats + 3) * batch
  writer = subprocess.Popen(
    [sys.executable, '-m', 'experiments.benchmarks.transport_benchmark',
     '--write-to', reader.address, '--unrolls', str(total), '--batch', str(batch),
     '--content', content],
    stdout=subprocess.PIPE,
    text=True,
  )  # fmt: skip
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
    'writer': json.loads(output),
  }


def run_writer(address: str, unrolls: int, batch: int, content: str) -> dict:
  """The writing process of `bench_reverb`."""
  from impala_jax.distributed.transport import reverb as reverb_transport

  form = layout()
  writer = reverb_transport.ReverbWriter(address, form)
  rows = make_rows(form, content)
  figures = []
  with contextlib.closing(writer):
    mark = time.process_time()
    for i in range(unrolls):
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
    'peak_rss_mb': _peak_rss_mb(),
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


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--transport', choices=['local', 'reverb', 'both'], default='both'
  )
  parser.add_argument('--content', choices=['smooth', 'noise'], default='smooth')
  parser.add_argument('--unrolls', type=int, default=300, help='per repeat')
  parser.add_argument('--batch', type=int, default=32)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--write-to', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if min(args.unrolls, args.batch, args.repeats) < 1:
    parser.error('--unrolls, --batch and --repeats must be at least 1')
  if args.write_to:
    print(json.dumps(run_writer(args.write_to, args.unrolls, args.batch, args.content)))
    return
  batches = -(-args.unrolls // args.batch)
  result: dict = {
    'unroll_mb': round(layout().nbytes / 1e6, 3),
    'unrolls_per_repeat': batches * args.batch,
    'repeats': args.repeats,
    'batch': args.batch,
    'content': args.content,
    'versions': versions.installed(),
  }
  # The local one first: peak memory of a process only grows.
  if args.transport != 'reverb':
    result['local'] = bench_local(args.batch, batches, args.repeats, args.content)
  if args.transport != 'local':
    result['reverb'] = bench_reverb(args.batch, batches, args.repeats, args.content)
  print(json.dumps(result, indent=2))


if __name__ == '__main__':
  main()
