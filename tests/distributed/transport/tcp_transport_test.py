"""The transport `tcp`: the contract, and what only separate processes can do."""

import contextlib
import logging
import random
import socket
import time

import pytest

from impala_jax.distributed.connections import messages
from impala_jax.distributed.security import keys as run_keys
from impala_jax.distributed.transport import protocol as transport
from impala_jax.distributed.transport import tcp as tcp_transport
from tests.distributed.transport import network_contract
from tests.distributed.transport import transport_contract as contract

FORM = contract.layout()
LARGE = contract.layout(64, 32, 20)
assert FORM.nbytes <= tcp_transport._SMALL < LARGE.nbytes


@contextlib.contextmanager
def links(form):
  with contextlib.ExitStack() as stack:

    def make(capacity):
      reader = tcp_transport.TcpReader(form, contract.BATCH, capacity)
      stack.callback(reader.close)

      def writer():
        made = tcp_transport.TcpWriter(reader.address, form, connect_timeout=3.0)
        stack.callback(made.close)
        return made

      return contract.Link(reader, writer, slack=0)

    yield make


class TestSmallRows(contract.TransportContract, network_contract.NetworkContract):
  reader = tcp_transport.TcpReader
  writer = tcp_transport.TcpWriter

  @pytest.fixture
  def make(self):
    with links(FORM) as make:
      yield make


class TestLargeRows(contract.TransportContract):
  @pytest.fixture
  def make(self):
    with links(LARGE) as make:
      yield make


class Stranger:
  """Speaks to a reader by hand."""

  def __init__(self, reader, greets=True):
    self.socket = socket.create_connection(('127.0.0.1', reader.port), contract.LONG)
    if greets:
      form = reader.layout
      hello = tcp_transport._ROWS.pack(form.fingerprint, form.nbytes)
      self.say(tcp_transport._HELLO, hello)
      assert self.answer() == (tcp_transport._OK, '')

  def say(self, kind, content=b'', size=None):
    size = len(content) if size is None else size
    self.socket.sendall(messages.HEAD.pack(kind, size) + bytes(content))

  def answer(self):
    """Kind and words of the next answer that is not `_WAIT`; None at the end."""
    while True:
      head = self._receive(messages.HEAD.size)
      if not head:
        return None
      kind, size = messages.HEAD.unpack(head)
      words = self._receive(size).decode()
      if kind != tcp_transport._WAIT:
        return kind, words

  def _receive(self, size):
    data = b''
    while len(data) < size:
      try:
        more = self.socket.recv(size - len(data))
      except ConnectionResetError:
        return b''
      if not more:
        return b''
      data += more
    return data


@pytest.fixture(params=['small', 'large'])
def link(request):
  with links({'small': FORM, 'large': LARGE}[request.param]) as make:
    yield make(2 * contract.BATCH)


def _trains(link, first=0):
  """Whether honest rows still go through."""
  writer = link.writer()
  form = link.reader.layout
  for i in range(first, first + contract.BATCH):
    writer.write(contract.row(form, i, actor=77), contract.LONG)
  rows = contract.read_rows(link, contract.BATCH)
  return contract.sequences(link, rows, 77) == list(
    range(first, first + contract.BATCH)
  )


@pytest.mark.parametrize(
  ('kind', 'content', 'size', 'words'),
  [
    (tcp_transport._ROW, b'', 2**32 - 1, 'of the kind 2 and of 4294967295 bytes'),
    (tcp_transport._ROW, b'', 0, 'of the kind 2 and of 0 bytes'),
    (tcp_transport._ASK, b'', 2**31, 'of the kind 1'),
    (tcp_transport._HELLO, b'x' * 16, 16, 'of the kind 0'),  # A second time.
    (99, b'', 0, 'of the kind 99'),
    (tcp_transport._ASK, b'more', 0, 'more than one thing'),
  ],
)
def test_strange_messages_end_their_connection_alone(link, kind, content, size, words):
  stranger = Stranger(link.reader)
  stranger.say(kind, content, size)
  answer, said = stranger.answer()
  assert answer == tcp_transport._ENDED
  assert words in said
  assert stranger.answer() is None
  assert link.reader.stats().corrupted == 1
  assert _trains(link)


def test_rows_before_a_greeting_are_refused(link):
  stranger = Stranger(link.reader, greets=False)
  stranger.say(tcp_transport._ROW, size=link.reader.layout.nbytes)
  assert stranger.answer()[0] == tcp_transport._ENDED
  assert _trains(link)


def test_a_large_row_that_was_not_announced_is_refused():
  with links(LARGE) as make:
    link = make(8)
    stranger = Stranger(link.reader)
    stranger.say(tcp_transport._ROW, size=LARGE.nbytes)
    assert stranger.answer()[0] == tcp_transport._ENDED
    assert _trains(link)


def test_random_bytes_neither_stop_nor_fill_the_reader(link, caplog):
  rng = random.Random(0)
  with caplog.at_level(logging.WARNING):
    for _ in range(200):
      stranger = Stranger(link.reader, greets=rng.random() < 0.5)
      with contextlib.suppress(OSError):
        for _ in range(rng.randrange(1, 4)):
          if rng.random() < 0.5:
            stranger.say(rng.randrange(4), rng.randbytes(rng.randrange(64)))
          else:
            stranger.socket.sendall(rng.randbytes(rng.randrange(1, 5000)))
      stranger.socket.close()
  assert _trains(link)
  stats = link.reader.stats()
  assert stats.corrupted > 100
  assert (stats.received, stats.lost) == (contract.BATCH, 0)
  # One line a minute, however many strangers there are.
  assert len([r for r in caplog.records if 'refused' in r.getMessage()]) == 1


def test_those_who_fall_silent_in_a_message_give_their_place_back(monkeypatch):
  monkeypatch.setattr(tcp_transport, '_SILENCE', 0.5)
  with links(LARGE) as make:
    link = make(8)
    strangers = [Stranger(link.reader) for _ in range(contract.BATCH + 1)]
    for stranger in strangers[:-1]:  # All places.
      stranger.say(tcp_transport._ASK)
      assert stranger.answer()[0] == tcp_transport._GO
      stranger.say(tcp_transport._ROW, b'x', LARGE.nbytes)
    strangers[-1].say(tcp_transport._ASK)
    assert strangers[-1].answer()[0] == tcp_transport._GO  # When the others are out.
    for stranger in strangers[:-1]:
      answer, words = stranger.answer()
      assert (answer, 'no more came' in words) == (tcp_transport._ENDED, True)
    strangers[-1].socket.close()
    assert _trains(link)


def test_one_that_leaves_while_its_row_waits_takes_the_row_along(link):
  form = link.reader.layout
  writer = link.writer()
  accepted = contract.fill(writer, form)
  other = link.writer()
  with pytest.raises(TimeoutError):
    other.write(contract.row(form, 0, actor=1), 0.1)
  for leaving in (other, writer):
    leaving.close()
  end = time.monotonic() + contract.LONG
  while link.reader._connections and time.monotonic() < end:
    time.sleep(0.01)
  rows = contract.read_rows(link, accepted // contract.BATCH * contract.BATCH)
  assert contract.sequences(link, rows, 1) == []
  assert _trains(link)


@pytest.fixture(scope='module')
def keys(tmp_path_factory):
  """Of two runs."""
  pytest.importorskip('cryptography', reason='no cryptography (latest set)')
  folders = [tmp_path_factory.mktemp('run') / 'keys' for _ in range(2)]
  for folder in folders:
    run_keys.ensure(folder)
  return folders


@pytest.mark.parametrize('form', [FORM, LARGE], ids=['small', 'large'])
def test_with_keys_only_those_of_the_run_get_in(keys, form):
  ours, others = keys
  load = run_keys.load
  reader = tcp_transport.TcpReader(form, 4, 8, keys=load(ours, run_keys.LEARNER))
  with contextlib.closing(reader):

    def writer(keys):
      return tcp_transport.TcpWriter(reader.address, form, 5.0, keys)

    for stranger in (None, load(others, run_keys.CLIENT)):
      made = writer(stranger)
      with pytest.raises(transport.TransportError, match='out of reach'):
        made.write(contract.row(form, 0), 1.0)
      made.close()
    with contextlib.closing(writer(load(ours, run_keys.CLIENT))) as made:
      link = contract.Link(reader, lambda: made, 0)
      assert _trains(link)
      accepted = contract.fill(made, form)
      sender = contract.Call(
        lambda: [
          made.write(contract.row(form, i), contract.LONG)
          for i in range(accepted, 5 * contract.BATCH)
        ]
      )
      rows = contract.read_rows(link, 5 * contract.BATCH)
      assert sender.result() is None
      assert contract.sequences(link, rows) == list(range(5 * contract.BATCH))


def test_no_actor_passes_for_the_learner(keys):
  load = run_keys.load
  # The client's certificate is good for no server, and has another name.
  reader = tcp_transport.TcpReader(FORM, 4, 8, keys=load(keys[0], run_keys.CLIENT))
  client = load(keys[0], run_keys.CLIENT)
  with contextlib.closing(reader):
    writer = tcp_transport.TcpWriter(reader.address, FORM, 5.0, client)
    with pytest.raises(transport.TransportError, match='out of reach'):
      writer.write(contract.row(FORM, 0), 1.0)
    writer.close()
