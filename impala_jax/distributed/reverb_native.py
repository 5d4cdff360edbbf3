"""Reverb's client without TensorFlow's Python package, for actor processes.

`import reverb` imports all of TensorFlow: seconds of CPU and hundreds of megabytes
in each actor. Its compiled client needs one library of TensorFlow alone, the one
that it is linked against, and that loads in milliseconds.
"""

import ctypes
import importlib.util
import os
import sys
from typing import Any, NamedTuple

# Fields of `TableInfo` in Reverb's schema.proto.
_NAME, _CURRENT_SIZE = 8, 7


def client_module() -> Any:
  """The extension module of Reverb, alone where possible.

  A later `import reverb` in the same process uses the same module.

  Raises:
    ImportError: Reverb or TensorFlow is not installed.
  """
  name = 'reverb.libpybind'
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


class TableInfo(NamedTuple):
  name: str
  size: int  # Items in the table.


def server_info(client: Any, timeout: float) -> list[TableInfo]:
  """Asks the server of `client` for its tables; waits `timeout` seconds at most.

  Reverb counts this time-out in whole seconds, so it is rounded up to one.

  Raises:
    ConnectionError: no answer.
  """
  # Reverb's own message class would import TensorFlow.
  from google.protobuf import empty_pb2, unknown_fields

  try:
    answers = client.ServerInfo(max(1, round(timeout + 0.5)))
  except RuntimeError as e:
    raise ConnectionError(str(e)) from e
  tables = []
  for answer in answers:
    message = empty_pb2.Empty.FromString(answer)
    fields = {f.field_number: f.data for f in unknown_fields.UnknownFieldSet(message)}
    tables.append(TableInfo(fields[_NAME].decode(), fields.get(_CURRENT_SIZE, 0)))
  return tables


def _package(name: str) -> str:
  """Folder of an installed package, without importing it."""
  spec = importlib.util.find_spec(name)
  if spec is None or spec.origin is None:
    raise ImportError(
      f'the reverb transport needs the package {name!r}, which is not installed; '
      'transport.kind=local works in one process without it'
    )
  return os.path.dirname(spec.origin)
