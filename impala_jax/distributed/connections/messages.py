"""Messages over TCP: what the transport `tcp` and inference share.

A message is a kind and a length, and then so many bytes. Plain, or inside TLS with the
keys of the run. (gRPC needs three times the CPU time a call, and these are made for
every step and every unroll of an actor.)
"""

import socket
import ssl
import struct
import time

from impala_jax.distributed.security import keys as run_keys

HEAD = struct.Struct('<II')  # Kind, length.


class Client:
  """The connecting side, which asks and is answered. Used by one thread.

  The connection is made by the first `send`, and again after a failure.

  Args:
    address: host:port.
    name: of the server in its certificate, one of `keys`.
    keys: of a client, where the server has keys.
    largest: bytes that an answer may have.
  """

  def __init__(
    self,
    address: str,
    name: str,
    keys: run_keys.Keys | None = None,
    largest: int = 1 << 28,
  ):
    self.address = address
    self._name = name
    self._keys = keys
    self._largest = largest
    self._socket: socket.socket | None = None
    self._head = bytearray(HEAD.size)
    self._got = 0  # Bytes of the head.

  @property
  def connected(self) -> bool:
    return self._socket is not None

  def connect(self, deadline: float) -> None:
    """Raises OSError, also where nobody answers until `deadline` (`time.monotonic`)."""
    host, _, port = self.address.rpartition(':')
    where = host.strip('[]'), int(port)
    connected = socket.create_connection(where, _left(deadline))
    try:
      connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
      # That the other host has gone is noticed in the end.
      connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
      if self._keys is not None:
        # The name belongs to the certificate, not to the machine.
        context = tls(self._keys, ssl.PROTOCOL_TLS_CLIENT)
        connected.settimeout(_left(deadline))
        connected = context.wrap_socket(connected, server_hostname=self._name)
    except BaseException:
      connected.close()
      raise
    self._socket, self._got = connected, 0

  def send(self, kind: int, *parts: bytes | memoryview, timeout: float) -> None:
    """Sends one message.

    Args:
      kind: of the message.
      *parts: that its bytes consist of.
      timeout: seconds that may pass while the other side takes nothing.

    Raises:
      OSError: it cannot; the connection is closed, since it may be in the midst of it.
    """
    try:
      if self._socket is None:
        self.connect(time.monotonic() + timeout)
      assert self._socket is not None
      self._socket.settimeout(timeout)
      head = HEAD.pack(kind, sum(len(part) for part in parts))
      # One packet where it is small; else large parts are not copied.
      small = sum(len(part) for part in parts) < 1 << 16
      for piece in [b''.join([head, *parts])] if small else [head, *parts]:
        view = memoryview(piece)
        while view:  # Unlike `sendall`, whose limit is for the whole.
          view = view[self._socket.send(view) :]
    except OSError:  # TimeoutError and those of TLS, too.
      self.close()
      raise

  def receive(self, deadline: float) -> tuple[int, bytes]:
    """Kind and bytes of the next message.

    Raises:
      TimeoutError: nothing of it came until `deadline`; asking again is right.
      OSError: the connection broke, or makes no sense, and was closed.
    """
    if self._socket is None:
      raise ConnectionError('the connection was closed')
    head = memoryview(self._head)
    try:
      while self._got < HEAD.size:
        self._socket.settimeout(_left(deadline))
        try:
          count = self._socket.recv_into(head[self._got :])
        except TimeoutError:
          if self._got:
            raise ConnectionError('half of an answer') from None
          raise
        if not count:
          raise ConnectionError('the connection was closed')
        self._got += count
      self._got = 0
      kind, size = HEAD.unpack(self._head)
      if size > self._largest:
        raise ConnectionError(f'an answer of {size} bytes')
      return kind, self._rest(size, deadline) if size else b''
    except TimeoutError:
      raise
    except OSError:
      self.close()
      raise

  def close(self) -> None:
    """Idempotent; the next `send` connects anew."""
    if self._socket is not None:
      self._socket.close()
    self._socket = None

  def _rest(self, size: int, deadline: float) -> bytes:
    assert self._socket is not None
    data = bytearray(size)
    view = memoryview(data)
    while view:
      self._socket.settimeout(_left(deadline))
      try:
        count = self._socket.recv_into(view)
      except TimeoutError:
        raise ConnectionError('half of an answer') from None
      if not count:
        raise ConnectionError('the connection was closed')
      view = view[count:]
    return bytes(data)


def tls(keys: run_keys.Keys, side: int) -> ssl.SSLContext:
  """For `ssl.PROTOCOL_TLS_CLIENT` or `..._SERVER`; both sides must have a key."""
  context = ssl.SSLContext(side)
  context.minimum_version = ssl.TLSVersion.TLSv1_3
  context.load_cert_chain(keys.certificate, keys.key)
  context.load_verify_locations(keys.authority)
  context.verify_mode = ssl.CERT_REQUIRED
  return context


def _left(deadline: float) -> float:
  return max(1e-3, deadline - time.monotonic())
