"""Items that no `ReverbWriter` would send: refused, or the learner dies with a cause.

The server checks neither sizes nor types, not even with a signature: clients do. What
it stores, the learner's process decodes. So there is no way here to refuse an item
that claims an absurd shape; what is promised is that the learner never hangs on it.
"""

import contextlib
import re
import subprocess
import sys
import threading

import grpc
import pytest

from tests.distributed.transport import transport_contract as contract

pytest.importorskip('reverb', reason='Reverb is not installed (latest set)')

FORM = contract.layout()
_UINT8, _FLOAT32 = 4, 1
# Reads until it fails, as a learner does.
_LEARNER = """
from impala_jax.distributed.transport import protocol as transport
from impala_jax.distributed.transport import reverb as reverb_transport
from tests.distributed.transport import transport_contract as contract
reverb_transport._STUCK = 2.0
reader = reverb_transport.ReverbReader(contract.layout(), 4, 8)
print(reader.port, flush=True)
while True:
  try:
    batch = reader.read(0.5)
    print('read', len(batch.rows), 'refused', reader.stats().corrupted, flush=True)
    batch.release()
  except TimeoutError:
    pass
  except transport.TransportError as e:
    print('CAUSE:', e, flush=True)
    import os
    os._exit(1)
"""


def _varint(number: int) -> bytes:
  number %= 1 << 64
  out = b''
  while number > 127:
    out += bytes([number & 127 | 128])
    number >>= 7
  return out + bytes([number])


def _field(number: int, value: 'int | bytes') -> bytes:
  """One field of a protocol buffer."""
  if isinstance(value, int):
    return _varint(number << 3) + _varint(value)
  return _varint(number << 3 | 2) + _varint(len(value)) + value


def _item(shape: list[int], dtype: int, content: bytes) -> bytes:
  """A request of Reverb's InsertStream: one chunk, and one item made of it."""
  key = _field(1, 77)
  dims = b''.join(_field(2, _field(1, size)) for size in shape)
  tensor = _field(1, dtype) + _field(2, dims) + _field(4, content)
  chunk = key + _field(2, _field(1, 5)) + _field(5, _field(1, tensor)) + _field(6, 1)
  column = _field(1, _field(1, key + _field(3, 1)) + _field(2, 1))
  item = key + _field(2, f'unrolls_{FORM.nbytes}'.encode()) + _field(8, column)
  return _field(1, chunk) + _field(2, item) + _field(3, _varint(77))


def _send(port: int, request: bytes) -> None:
  """Returns when the server has confirmed the item."""
  confirmed = threading.Event()

  def requests():
    yield request
    confirmed.wait(contract.LONG)

  with grpc.insecure_channel(f'localhost:{port}') as channel:
    insert = channel.stream_stream('/deepmind.reverb.ReverbService/InsertStream')
    for _ in insert(requests(), timeout=contract.LONG, wait_for_ready=True):
      confirmed.set()
      return
  raise AssertionError('not confirmed')


@pytest.fixture
def learner():
  child = subprocess.Popen(
    [sys.executable, '-c', _LEARNER],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  yield child
  child.kill()
  child.communicate()


def test_what_is_no_row_is_refused(learner):
  from impala_jax.distributed.transport import reverb as reverb_transport

  port = int(learner.stdout.readline())
  strange = (
    _item([1, FORM.nbytes], _FLOAT32, b'\xff' * 50),
    _item([1, FORM.nbytes + 1], _UINT8, b'\xff' * 50),
    # Not even compressed data: it comes out as zeros, which have no checksum.
    _item([1, FORM.nbytes], _UINT8, b'\xff' * 50),
  )
  writer = reverb_transport.ReverbWriter(f'localhost:{port}', FORM)
  for number, item in enumerate(strange):
    _send(port, item)
    for i in range(16):
      writer.write(contract.row(FORM, 16 * number + i), contract.LONG)
  writer.close()
  refused = 0
  while refused < 3:
    words = learner.stdout.readline().split()
    assert words[:3] == ['read', '4', 'refused']
    refused = int(words[3])


@pytest.mark.parametrize('shape', [[1, 10**12], [1, -5], []])
def test_absurd_shapes_end_the_learner(learner, shape):
  from impala_jax.distributed.transport import protocol as transport
  from impala_jax.distributed.transport import reverb as reverb_transport

  port = int(learner.stdout.readline())
  with contextlib.suppress(grpc.RpcError):  # It may be gone before it has answered.
    _send(port, _item(shape, _UINT8, b'\xff' * 50))
  writer = reverb_transport.ReverbWriter(f'localhost:{port}', FORM, 2.0)
  for i in range(20):
    try:
      writer.write(contract.row(FORM, i), 1.0)
    except (TimeoutError, transport.TransportError):
      break
  writer.close()
  rest, _ = learner.communicate(timeout=contract.LONG)
  assert learner.returncode != 0
  # Either it was brought down at once, or it says what is wrong.
  assert learner.returncode < 0 or re.search(
    'CAUSE: (Reverb delivers nothing|reading from Reverb failed: )', rest
  )
