"""The C library of oneDNN by ctypes: memory descriptors and primitives.

The names follow its C API, version 3 (`dnnl.h`); numbers stand for its enumerations.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.ffi

VARIABLE = 'IMPALA_JAX_ONEDNN'
TARGET = 'impala_jax_onednn'  # Of XLA's calls.
# The extension module that is calls.c: as a wheel has it, and as `make setup` compiles
# it for the source tree.
_CALLS = ('impala_jax.onednn._calls', 'impala_jax_onednn')
# Packages that carry nothing but the library, the one for CPUs alone first.
_PACKAGES = ('onednn-cpu-gomp', 'onednn')
_NAME = 'libdnnl.so.3'
_CPU, _F32, _ANY, _USER_SCRATCHPAD = 1, 3, 1, 1
_SCRATCHPAD_MD = 136
_MOST_ARGUMENTS = 8  # As in calls.c.
_Dims = ctypes.c_int64 * 12


class Unavailable(Exception):
  """There is no oneDNN; the text says why."""


_OF_ONEDNN = (
  'memory_create',
  'memory_destroy',
  'primitive_execute',
  'stream_create',
  'stream_wait',
)


class _Functions(ctypes.Structure):
  """`struct functions` of calls.c."""

  _fields_ = [
    *((name, ctypes.c_void_p) for name in (*_OF_ONEDNN, 'set_threads', 'engine')),
    ('threads', ctypes.c_int),
  ]


class _Argument(ctypes.Structure):
  _fields_ = [
    ('number', ctypes.c_int),
    ('place', ctypes.c_int),
    ('desc', ctypes.c_void_p),
  ]


class _Step(ctypes.Structure):
  _fields_ = [
    ('primitive', ctypes.c_void_p),
    ('count', ctypes.c_int),
    ('arguments', _Argument * _MOST_ARGUMENTS),
  ]


# A primitive and its arguments: number (DNNL_ARG_...), descriptor of the memory, and
# its place among the inputs and outputs of the call.
Step = tuple[ctypes.c_void_p, Sequence[tuple[int, ctypes.c_void_p, int]]]


@functools.cache
def available() -> bool:
  """Whether `load` returns a library; the first call logs it."""
  try:
    library = load()
  except Unavailable as e:
    logging.info('convolutions on CPU by XLA: %s', e)
    return False
  logging.info('convolutions on CPU by oneDNN %s', library.version)
  return True


@functools.cache
def load() -> 'Library':
  """Returns the library of this process.

  IMPALA_JAX_ONEDNN may name its file; empty or `off`, there is none.

  Raises:
    Unavailable: it is not installed, switched off, or cannot be loaded.
  """
  if sys.platform != 'linux':
    raise Unavailable(f'oneDNN is looked for on Linux, not on {sys.platform}')
  place = os.environ.get(VARIABLE)
  if place in ('', 'off'):
    raise Unavailable(f'{VARIABLE} is {place!r}')
  path = pathlib.Path(place) if place else _installed()
  found = [spec.origin for spec in map(importlib.util.find_spec, _CALLS) if spec]
  calls = next((origin for origin in found if origin), None)
  if calls is None:
    raise Unavailable(
      f'the module {_CALLS[0]} is not there: it is compiled when impala_jax is '
      'installed, where there is a C compiler'
    )
  # Threads that wait for work sleep: XLA's own need the cores meanwhile.
  os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
  try:
    return Library(path, pathlib.Path(calls))
  except (OSError, AttributeError) as e:  # AttributeError: a function is missing.
    raise Unavailable(f'{path} cannot be used: {e}') from None


def _installed() -> pathlib.Path:
  for package in _PACKAGES:
    try:
      files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
      continue
    for file in files:
      if file.name == _NAME:
        return pathlib.Path(str(file.locate()))
  raise Unavailable(f'{_PACKAGES[0]} is not installed')


class Library:
  """The library's calls; each raises RuntimeError where the library refuses.

  Args:
    path: of oneDNN.
    calls: what was compiled of calls.c.

  Raises:
    OSError, AttributeError: one of them is not what it should be.
  """

  def __init__(self, path: pathlib.Path, calls: pathlib.Path):
    self._c = ctypes.CDLL(str(path))
    self._calls = ctypes.CDLL(str(calls))
    self._c.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
    self._c.dnnl_primitive_desc_query_md.restype = ctypes.c_void_p
    self._c.dnnl_version.restype = ctypes.POINTER(ctypes.c_int * 3)
    self.version = '.'.join(map(str, self._c.dnnl_version().contents))
    if self.version.split('.')[0] != '3':
      raise OSError(f'its version is {self.version}, but 3 is needed')
    self._engine = self._create('engine', _CPU, ctypes.c_size_t(0))
    self._attributes = self._create('primitive_attr')
    self._call('primitive_attr_set_scratchpad_mode', self._attributes, _USER_SCRATCHPAD)
    self._hand_over()
    jax.ffi.register_ffi_target(
      TARGET, jax.ffi.pycapsule(self._calls.impala_jax_onednn_call), platform='cpu'
    )

  def describe(
    self, shape: Sequence[int], strides: Sequence[int] | None = None
  ) -> ctypes.c_void_p:
    """Descriptor of float32 memory; without `strides` in any layout it likes."""
    if strides is None:
      return self._create(
        'memory_desc', len(shape), dims(*shape), _F32, _ANY, how='create_with_tag'
      )
    return self._create(
      'memory_desc',
      len(shape),
      dims(*shape),
      _F32,
      dims(*strides),
      how='create_with_strides',
    )

  def primitive_desc(self, name: str, *args: Any) -> ctypes.c_void_p:
    """Descriptor of a primitive, such as 'convolution_forward'."""
    return self._create(
      name, self._engine, *args, self._attributes, how='primitive_desc_create'
    )

  def reorder_desc(
    self, source: ctypes.c_void_p, target: ctypes.c_void_p
  ) -> ctypes.c_void_p:
    return self._create(
      'reorder',
      source,
      self._engine,
      target,
      self._engine,
      self._attributes,
      how='primitive_desc_create',
    )

  def primitive(self, desc: ctypes.c_void_p) -> ctypes.c_void_p:
    return self._create('primitive', desc)

  def memory_of(self, desc: ctypes.c_void_p, query: int) -> ctypes.c_void_p:
    """Descriptor of one of a primitive's memories, of size 0 where it needs none."""
    found = ctypes.c_void_p(self._c.dnnl_primitive_desc_query_md(desc, query, 0))
    if not found:
      raise RuntimeError(f'oneDNN: a primitive has no memory {query}')
    return found

  def scratchpad_of(self, desc: ctypes.c_void_p) -> ctypes.c_void_p | None:
    """Descriptor of a primitive's scratch memory; None where it needs none."""
    found = self.memory_of(desc, _SCRATCHPAD_MD)
    return found if self.size(found) else None

  def size(self, desc: ctypes.c_void_p) -> int:
    """Bytes of a memory."""
    return self._c.dnnl_memory_desc_get_size(desc)

  def equal(self, a: ctypes.c_void_p, b: ctypes.c_void_p) -> bool:
    return bool(self._c.dnnl_memory_desc_equal(a, b))

  def add_program(self, name: str, steps: Sequence[Step]) -> int:
    """Makes primitives callable from XLA.

    Args:
      name: the same in each process for the same steps, as compiled computations are
        kept and have the number in them.
      steps: in order; none may have more than eight arguments.

    Returns:
      What the attribute of a call of `TARGET` must be to run them.
    """
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], 'big')
    array = (_Step * len(steps))()
    for step, (primitive, arguments) in zip(array, steps, strict=True):
      step.primitive, step.count = primitive, len(arguments)
      for slot, (argument, desc, place) in enumerate(arguments):
        step.arguments[slot] = _Argument(argument, place, desc)
    done = self._calls.impala_jax_onednn_add(ctypes.c_int64(number), array, len(array))
    if not done:
      raise RuntimeError(f'oneDNN: {name} is too large a program')
    return number

  def _hand_over(self) -> None:
    """Gives calls.c what it needs of oneDNN."""
    address = lambda function: ctypes.cast(function, ctypes.c_void_p)
    functions = _Functions(engine=self._engine, threads=threads())
    for name in _OF_ONEDNN:
      setattr(functions, name, address(getattr(self._c, f'dnnl_{name}')))
    try:
      openmp = ctypes.CDLL('libgomp.so.1')
      functions.set_threads = address(openmp.omp_set_num_threads)
    except OSError:
      pass  # Another OpenMP: it goes by OMP_NUM_THREADS.
    self._calls.impala_jax_onednn_use(ctypes.byref(functions))

  def _create(self, name: str, *args: Any, how: str = 'create') -> ctypes.c_void_p:
    created = ctypes.c_void_p()
    self._call(f'{name}_{how}', ctypes.byref(created), *args)
    return created

  def _call(self, name: str, *args: Any) -> None:
    status = getattr(self._c, f'dnnl_{name}')(*args)
    if status:
      raise RuntimeError(f'oneDNN refuses {name}: status {status}')


def dims(*sizes: int) -> ctypes.Array:
  return _Dims(*sizes)


def threads() -> int:
  """As many as XLA takes: NPROC where it is set, else the cores of this process."""
  named = os.environ.get('NPROC', '')
  if named.isdigit() and int(named):
    return int(named)
  return len(os.sched_getaffinity(0))
