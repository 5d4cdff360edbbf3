"""Reverb's client without TensorFlow's Python package.

`import reverb` imports all of TensorFlow: seconds of CPU and hundreds of megabytes
in each process. Its compiled module needs one library of TensorFlow alone, the one
that it is linked against, and that loads in milliseconds. See also `reverb_server`.
"""

import contextlib
import ctypes
import importlib.util
import math
import os
import sys
from typing import Any, NamedTuple

from impala_jax import types
from impala_jax.distributed.security import ports

# Fields of `TableInfo` in Reverb's schema.proto.
_NAME, _CURRENT_SIZE = 8, 7


def client_module() -> Any:
  """The extension module of Reverb, alone where possible.

  A later `import reverb` in the same process uses the same module.

  Raises:
    ImportError: Reverb or TensorFlow is not installed.
  """
  name = 'reverb.libpybind'
  ports.bypass_proxy()  # Its connections have no such option.
  if name in sys.modules:
    return sys.modules[name]
  try:
    library = os.path.join(_package('tensorflow'), 'libtensorflow_framework.so.2')
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    path = os.path.join(_package('reverb'), 'libpybind.so')
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
  except (OSError, ImportError):
    # Another build of Reverb or TensorFlow: the whole import works or explains.
    from reverb import pybind

    return pybind
  sys.modules[name] = module
  return module


class Table(NamedTuple):
  name: str
  size: int  # Items in the table.


class Connection:
  """One client and one writer of it. No method blocks without a limit.

  Nothing is sent before the first call of `tables` or `send`.
  """

  def __init__(self, address: str):
    module = client_module()
    self._client = module.Client(address)
    # Validation would ask the server for its tables, without a time-out.
    validate = False
    self._writer = self._client.NewTrajectoryWriter(
      module.AutoTunedChunkerOptions(1, 1.0), validate
    )

  def tables(self, timeout: float) -> list[Table]:
    """Asks the server for its tables.

    Args:
      timeout: seconds; Reverb counts whole ones, so it is rounded up.

    Raises:
      ConnectionError: no answer in time.
    """
    try:
      answers = self._client.ServerInfo(max(1, math.ceil(timeout)))
    except RuntimeError as e:
      raise ConnectionError(str(e)) from e
    return [table_of(answer) for answer in answers]

  def send(self, table: str, row: types.Rows) -> None:
    """Hands a copy of `row` to Reverb's thread, as one item of `table`.

    Raises:
      ConnectionError: the connection broke for good.
    """
    squeeze = True  # The item is the row, not a sequence of one row.
    try:
      references = self._writer.Append([row])
      self._writer.CreateItem(table, 1.0, [references], [squeeze])
    except RuntimeError as e:
      raise ConnectionError(str(e)) from e

  def flush(self, timeout: float) -> bool:
    """Whether the server confirmed all items within `timeout` seconds.

    False where the queue is full, and just so where the server is gone. True is
    no proof: a server that stops confirms to blocked writers what it drops.

    Raises:
      ConnectionError: the connection broke for good.
    """
    try:
      self._writer.Flush(0, max(1, int(timeout * 1e3)))
    except RuntimeError as e:
      if 'Timeout exceeded' in str(e):
        return False
      raise ConnectionError(str(e)) from e
    return True

  def close(self) -> None:
    """Forgets what was not sent; the server may still insert an item it has."""
    with contextlib.suppress(RuntimeError):
      self._writer.Close()


def table_of(info: bytes) -> Table:
  """Reads a serialised `TableInfo`."""
  # Reverb's own message class would import TensorFlow.
  from google.protobuf import empty_pb2, unknown_fields

  message = empty_pb2.Empty.FromString(info)
  fields = {f.field_number: f.data for f in unknown_fields.UnknownFieldSet(message)}
  return Table(fields[_NAME].decode(), fields.get(_CURRENT_SIZE, 0))


def _package(name: str) -> str:
  """Folder of an installed package, without importing it."""
  spec = importlib.util.find_spec(name)
  if spec is None or spec.origin is None:
    raise ImportError(
      f'the reverb transport needs the package {name!r}, which is not installed; '
      'transport.kind=local works in one process without it'
    )
  return os.path.dirname(spec.origin)
