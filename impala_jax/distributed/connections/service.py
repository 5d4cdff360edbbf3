"""The listening side: an event loop in a thread of its own, for many clients."""

import asyncio
import concurrent.futures
import contextlib
import ssl
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from impala_jax.distributed.connections import messages
from impala_jax.distributed.security import keys as run_keys
from impala_jax.distributed.security import ports

_ANSWER = 30.0  # Seconds for the loop to do what it is asked.
_HANDSHAKE = 10.0  # Seconds that a client may take for that of TLS.
_T = TypeVar('_T')


class Service:
  """Listens, and makes an asyncio protocol for each connection.

  Args:
    name: of the thread.
    protocol: makes one, in the loop's thread.
    host: interface to bind, '' for all.
    port: 0 for any that is free.
    keys: of the server; then only clients with a certificate of the run get in.

  Attributes:
    port: that it listens at.
    loop: to be used through its thread-safe methods.

  Raises:
    OSError: the port is taken.
  """

  def __init__(
    self,
    name: str,
    protocol: Callable[[], asyncio.BaseProtocol],
    host: str = ports.LOOPBACK,
    port: int = 0,
    keys: run_keys.Keys | None = None,
  ):
    context = None if keys is None else messages.tls(keys, ssl.PROTOCOL_TLS_SERVER)
    # A thousand clients that come at once wait for their turn.
    listener = ports.listen(host, port, backlog=1024)
    self.port: int = listener.getsockname()[1]
    self.loop = asyncio.new_event_loop()
    self._thread = threading.Thread(
      target=self.loop.run_forever, name=name, daemon=True
    )
    self._thread.start()
    self._listening = self.wait(
      self.loop.create_server(
        protocol,
        sock=listener,
        backlog=1024,
        ssl=context,
        ssl_handshake_timeout=_HANDSHAKE if context else None,
      )
    )

  def wait(self, work: Coroutine[Any, Any, _T]) -> _T:
    """Runs `work` in the loop; raises TimeoutError where that takes too long."""
    return asyncio.run_coroutine_threadsafe(work, self.loop).result(_ANSWER)

  def close(self, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Stops listening, then runs `end`, which ends the connections. Idempotent.

    Bounded in time.
    """
    if self.loop.is_closed():
      return

    async def stop() -> None:
      self._listening.close()
      await end()

    with contextlib.suppress(concurrent.futures.TimeoutError):
      self.wait(stop())
    self.loop.call_soon_threadsafe(self.loop.stop)
    self._thread.join(5.0)
    if not self._thread.is_alive():
      self.loop.close()
