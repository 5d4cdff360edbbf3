"""Strangers' bytes at every door: nobody ends, nothing hangs, everything is counted.

Seeded, so that a failure comes again; more than 2,000 inputs in all. Each test also has
an honest client, which must be served as if nobody else were there.
"""

import contextlib
import json
import math
import pathlib
import random
import socket
import threading
from typing import Any

import grpc
import msgpack
import numpy as np
import pytest

from impala_jax import config as config_lib
from impala_jax import configs, types
from impala_jax.distributed.connections import messages
from impala_jax.distributed.control import board, protocol, wire
from impala_jax.distributed.control import grpc as control_grpc
from impala_jax.distributed.gang import meeting
from impala_jax.distributed.inference import connection as inference_connection
from impala_jax.distributed.inference import server as inference_server
from impala_jax.distributed.inference import sessions as inference_sessions
from impala_jax.distributed.inference import wire as inference_wire
from impala_jax.distributed.transport import local as local_transport
from impala_jax.learning import checkpointing
from impala_jax.runtime import files
from tests.distributed.transport import transport_contract as contract

LONG = 60.0
_NUMBERS = (
  0,
  1,
  -1,
  2**31,
  2**62,
  2**63 - 1,
  -(2**63),
  0.5,
  -0.0,
  1e300,
  math.nan,
  math.inf,
  -math.inf,
)


def anything(rng: random.Random, depth: int = 3) -> Any:
  """What msgpack and JSON can hold."""
  kind = rng.randrange(8 if depth else 5)
  if kind == 0:
    return rng.choice(_NUMBERS)
  if kind == 1:
    return rng.choice([None, True, False])
  if kind in (2, 3):
    return ''.join(
      chr(rng.choice([0, 10, 65, 0x7F, 0x2028, 0x1F600])) for _ in range(5)
    )
  if kind == 4:
    return rng.choice(['actor', 'learner', 'lost', 'episode', 'x' * 500])
  if kind == 5:
    return [anything(rng, depth - 1) for _ in range(rng.randrange(5))]
  return {
    str(anything(rng, 0)): anything(rng, depth - 1) for _ in range(rng.randrange(5))
  }


def spoil(rng: random.Random, good: Any) -> Any:
  """`good` with something else somewhere in it."""
  if isinstance(good, dict) and good and rng.random() < 0.9:
    key = rng.choice(list(good))
    if rng.random() < 0.1:
      return {k: v for k, v in good.items() if k != key}
    return {**good, key: spoil(rng, good[key])}
  if isinstance(good, list) and good and rng.random() < 0.8:
    at = rng.randrange(len(good))
    return [*good[:at], spoil(rng, good[at]), *good[at + 1 :]]
  return anything(rng)


def garble(rng: random.Random, good: bytes) -> bytes:
  """`good` cut, turned over in some bits, or something else."""
  kind = rng.randrange(4)
  if kind == 0:
    return good[: rng.randrange(len(good) + 1)]
  if kind == 1:
    return rng.randbytes(rng.randrange(200))
  data = bytearray(good)
  for _ in range(rng.randrange(1, 5)):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  return bytes(data) if kind == 2 else bytes(data) + rng.randbytes(9)


def test_reports():
  rng = random.Random(1)
  levels = ('first', 'second')
  control = board.Board(levels, {'actor': range(4), 'learner': range(0)})
  server = control_grpc.Server(control)
  honest = control_grpc.Client(server.address, timeout=LONG)
  report = protocol.Report(
    'actor',
    1,
    0,
    {'agent_steps': 5.0},
    {'version': 1.0},
    [protocol.Episode(1, 2.0, 3), protocol.EnvironmentFailure(1, 0, 0, 'it hung')],
  )
  good = msgpack.unpackb(wire.pack(report))
  fetch = msgpack.unpackb(wire.pack_fetch(3, 'x'))
  accepted = refused = 0
  with grpc.insecure_channel(server.address) as channel:
    for i in range(700):
      method, base = ('Fetch', fetch) if i % 7 == 0 else ('Report', good)
      if i % 2:
        message = msgpack.packb(spoil(rng, base))
      else:
        message = garble(rng, msgpack.packb(base))
      before = control.refusals.total
      try:
        channel.unary_unary(f'/impala_jax.Control/{method}')(message, timeout=LONG)
        accepted += 1
        if method == 'Report':
          unpacked, parts = wire.unpack(message, levels, control.processes)
          assert control.refusals.total == before + len(parts)
          assert all(math.isfinite(v) for v in unpacked.totals.values())
      except grpc.RpcError as e:
        refused += e.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert control.refusals.total == before + 1
      if i % 50 == 0:
        assert honest.report(protocol.Report('actor', 0, 0, {'agent_steps': float(i)}))
  assert accepted + refused == 700
  assert min(refused - 300, accepted - 20) > 0
  (own,) = (p for p, _ in control.peers() if (p.role, p.index) == ('actor', 0))
  assert own.totals['agent_steps'] == 650
  assert len(control.peers()) < 4200
  json.dumps([str(e) for e in control.drain_events()])
  honest.close()
  server.close()


def test_rows():
  rng = random.Random(2)
  form = contract.layout()
  queue = local_transport.LocalTransport(form, contract.BATCH, 64)
  queue.refuse_newer(9)
  writer = queue.writer()
  sent, honest, taken = 900, 0, []
  numbers = (0, 1, 5, 300, -1, 2**31 - 1, 2**40, 2**62, -(2**62))

  def stranger(i: int) -> np.ndarray:
    row = contract.row(form, i, actor=rng.randrange(3))
    header = form.header(row)
    kind = rng.randrange(4)
    if kind == 0:  # On the way.
      for _ in range(rng.randrange(1, 9)):
        row[rng.randrange(len(row))] ^= 1 << rng.randrange(8)
      return row
    if kind == 1:
      return np.frombuffer(rng.randbytes(len(row)), np.uint8)
    sequence, version = rng.choice([i, *numbers]), rng.choice([7, *numbers])
    if kind == 2:
      for _ in range(rng.randrange(1, 20)):
        row[form.fields[0].offset + rng.randrange(len(row) - 64)] = rng.randrange(256)
      sequence, version = i, 7
    form.seal(
      row,
      actor_id=rng.choice([int(header['actor_id']), -1, 2**31 - 1]),
      incarnation=rng.choice([0, 1, -1]),
      sequence=sequence,
      version=version,
    )
    return row

  def read() -> None:
    while True:
      try:
        batch = queue.read(0.01)
      except TimeoutError:
        return
      assert form.impossible(batch.rows) == {}
      taken.extend(form.header(r).copy() for r in batch.rows)
      batch.release()

  for i in range(sent):
    if i % 3:
      writer.write(stranger(i), LONG)
    else:
      writer.write(contract.row(form, honest, actor=7), LONG)
      honest += 1
    if i % 30 == 29:
      read()
  read()
  own = [int(h['sequence']) for h in taken if h['actor_id'] == 7]
  assert own == list(range(honest))[: len(own)]
  assert len(own) > honest - contract.BATCH
  stats = queue.stats()
  came = stats.received + stats.corrupted + stats.refused + stats.duplicated
  assert came + stats.stale + stats.queued - (stats.received - len(taken)) == sent
  assert queue.refusals.total == stats.corrupted + stats.refused
  assert stats.refused > 100
  assert stats.corrupted > 100
  assert 0 <= stats.lost < 2**20
  for w in queue.writers():
    assert w.next - w.first == w.received + w.lost + w.stale + w.refused
  lag = 9 - np.array([int(h['version']) for h in taken])
  assert ((lag >= 0) & (lag <= 9)).all()
  queue.close()


class _Batcher:
  """In the place of a policy."""

  max_batch, capacity = 4, 8

  def __init__(self) -> None:
    self.refused = 0
    self._sessions = inference_sessions.Sessions(8, lambda session: None)
    self.join, self.leave = self._sessions.join, self._sessions.leave

  def submit(self, request: inference_wire.Request) -> Any:
    self._sessions.get(request.session)
    raise inference_wire.WireError('nothing is decided here')

  def refuse(self) -> None:
    self.refused += 1


def test_inference():
  rng = random.Random(3)
  spec = types.EnvironmentSpec(types.ArraySpec((2, 2), np.dtype(np.float32)), 3)
  form = inference_wire.Wire(spec, ())
  batcher = _Batcher()
  server = inference_server.Server(batcher, form)
  port = int(server.address.rpartition(':')[2])
  zeros = np.zeros(2, np.float32)
  request = form.pack_request(
    inference_wire.Request(
      5,
      np.arange(2, dtype=np.int32),
      np.ones(2, bool),
      np.zeros(2, np.int32),
      types.TimeStep(
        np.zeros(2, np.uint8), zeros, zeros, np.zeros((2, 2, 2), np.float32)
      ),
    )
  )
  join = {'client': 'x', 'environments': 1, 'form': form.fingerprint}
  head = messages.HEAD
  for i in range(450):
    kind = rng.choice([0, 1, 2, 77, 2**32 - 1])
    if kind == 1:
      message = garble(rng, request)
    elif i % 2:
      message = msgpack.packb(spoil(rng, join))
    else:
      message = garble(rng, msgpack.packb(join))
    before = batcher.refused
    with socket.create_connection(('127.0.0.1', port), LONG) as connection:
      if i % 9 == 0:  # Broken off, or of an absurd length.
        connection.sendall(head.pack(kind, rng.choice([9, 2**31])) + message[:5])
        continue
      connection.sendall(head.pack(kind, len(message)) + message)
      status, size = head.unpack(connection.recv(head.size, socket.MSG_WAITALL))
      connection.recv(size, socket.MSG_WAITALL)
      assert (batcher.refused > before) == (status == inference_connection.REFUSED)
  own = inference_connection.Connection(server.address, form)
  own.leave(own.join('honest', 2))
  own.close()
  server.close()


def test_the_meeting_of_learners(tmp_path):
  rng = random.Random(4)
  found: list[Any] = []
  first = threading.Thread(
    target=lambda: found.append(
      meeting.receive_from_others(tmp_path, '', 2, lambda: False)
    ),
    daemon=True,
  )
  first.start()
  while not (place := files.read_json(tmp_path / 'gang.json')):
    first.join(0.05)
  hello = json.dumps(['hello', 'not the token', 1]).encode() + b'\n'
  silent = []
  for i in range(250):
    connection = socket.create_connection((place['host'], place['port']), LONG)
    with contextlib.suppress(OSError):
      connection.sendall(
        garble(rng, hello)
        if i % 2
        else rng.choice(
          [
            b'[' * 60_000,
            b'\xff' * 99 + b'\n',
            b'\n',
            json.dumps(anything(rng)).encode(),
          ]
        )
      )
    if i % 5:
      connection.close()
    else:
      silent.append(connection)
  other = meeting.reach_first(tmp_path, 1, lambda: False)
  first.join(LONG)
  assert not first.is_alive()
  other.send('it is', 1)
  assert found[0][1].receive(LONG) == ['it is', 1]
  for connection in (*silent, other, found[0][1]):
    connection.close()


def test_checkpoints(tmp_path):
  rng = random.Random(5)
  state = {'x': np.arange(6, dtype=np.float32)}
  sound = checkpointing.save(tmp_path, 1, state, {'updates': 1, 'frames': 20})
  good = sound.read_bytes()
  for i in range(250):
    damaged = garble(rng, good)
    path = tmp_path / f'checkpoint_{i + 2:010d}.msgpack'
    path.write_bytes(damaged)
    if damaged != good:
      with pytest.raises(checkpointing.CheckpointError):
        checkpointing.read(path)
  found = checkpointing.latest(tmp_path, state)
  assert found is not None
  np.testing.assert_array_equal(found.state['x'], state['x'])


def test_configurations(tmp_path: pathlib.Path):
  rng = random.Random(6)
  good = config_lib.to_dict(configs.get('catch'))
  names = [info.name for info in config_lib.describe_settings()]
  refused = 0
  for i in range(500):
    try:
      if i % 2:
        made = config_lib.from_dict(spoil(rng, spoil(rng, good)))
      else:
        name = rng.choice([*names, 'learner', 'x.y', ''])
        text = rng.choice([*map(str, _NUMBERS), 'true', 'a,,b', '\x00', '9' * 400])
        made = config_lib.override(configs.get('catch'), [f'{name}={text}'])
      config_lib.validate(made)
      files.write_json(tmp_path / 'config.json', config_lib.to_dict(made))
    except config_lib.ConfigError:
      refused += 1
  assert 200 < refused < 500
