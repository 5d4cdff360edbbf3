"""What oneDNN computes for one shape: primitives, and the memory between them.

Images are [N, H, W, C] and kernels [h, w, in, out], as in JAX. oneDNN is told so by
strides; it likes another layout of kernels, into which they are brought first.
"""

import ctypes
import dataclasses
import functools

from impala_jax.onednn import library as library_lib

# Of `dnnl_types.h`: kinds, arguments and queries.
_FORWARD, _AUTO, _MAX = 64, 3, 0x1FF
_SRC, _DST, _WEIGHTS, _BIAS, _WORKSPACE, _SCRATCHPAD = 1, 17, 33, 41, 64, 80
_DIFF_SRC, _DIFF_DST, _DIFF_WEIGHTS, _DIFF_BIAS = 129, 145, 161, 169
_WEIGHTS_MD, _DIFF_WEIGHTS_MD, _WORKSPACE_MD = 131, 132, 135

Padding = tuple[tuple[int, int], tuple[int, int]]
_Desc = ctypes.c_void_p


@dataclasses.dataclass(frozen=True)
class Window:
  """A convolution or pooling of images of one shape.

  Attributes:
    images: [N, H, W, C].
    channels: of the result.
    size: height and width of the window.
    strides: of its steps.
    padding: before and after, of height and width.
  """

  images: tuple[int, int, int, int]
  channels: int
  size: tuple[int, int]
  strides: tuple[int, int]
  padding: Padding

  @property
  def kernel(self) -> tuple[int, int, int, int]:
    return (*self.size, self.images[3], self.channels)

  @property
  def result(self) -> tuple[int, int, int, int]:
    height, width = (
      (length + sum(padding) - size) // stride + 1
      for length, padding, size, stride in zip(
        self.images[1:3], self.padding, self.size, self.strides, strict=True
      )
    )
    return (self.images[0], height, width, self.channels)

  def __str__(self) -> str:
    """A name that is the same in each process."""
    parts = (self.images, (self.channels,), self.size, self.strides, *self.padding)
    return '_'.join('x'.join(map(str, part)) for part in parts)


class Kernel:
  """Primitives in order, and the memory between them.

  Attributes:
    name: the same in each process.
    scratch: bytes of each memory that it needs besides its inputs and outputs.
  """

  def __init__(self, name: str, places: int):
    self.name = name
    self.scratch: list[int] = []
    self._places = places
    self._steps: list[library_lib.Step] = []
    self._library = library_lib.load()

  def add(self, desc: _Desc, *arguments: tuple[int, _Desc, int]) -> None:
    """Adds a primitive; an argument is its number, its descriptor and its place."""
    scratchpad = self._library.scratchpad_of(desc)
    if scratchpad is not None:
      arguments += ((_SCRATCHPAD, scratchpad, self.reserve(scratchpad)),)
    self._steps.append((self._library.primitive(desc), arguments))

  def reserve(self, desc: _Desc) -> int:
    """Returns the place of scratch memory."""
    self.scratch.append(self._library.size(desc))
    return self._places + len(self.scratch) - 1

  def bring(self, source: _Desc, place: int, target: _Desc) -> int:
    """Adds a change of layout where one is needed; returns the new place."""
    if self._library.equal(source, target):
      return place
    new = self.reserve(target)
    self.reorder(source, place, target, new)
    return new

  def reorder(self, source: _Desc, place: int, target: _Desc, new: int) -> None:
    self.add(
      self._library.reorder_desc(source, target),
      (_SRC, source, place),
      (_DST, target, new),
    )

  @functools.cached_property
  def number(self) -> int:
    """By which a call from XLA names it. Its places: inputs, outputs, scratch."""
    return self._library.add_program(self.name, self._steps)


@functools.cache
def convolution(window: Window) -> Kernel:
  """(images, kernel, bias [out]) -> result."""
  layout = _Layout(window)
  kernel = Kernel(f'convolution_{window}', places=4)
  weights = layout.library.memory_of(layout.forward, _WEIGHTS_MD)
  place = kernel.bring(layout.kernel, 1, weights)
  kernel.add(
    layout.forward,
    (_SRC, layout.images, 0),
    (_WEIGHTS, weights, place),
    (_BIAS, layout.bias, 2),
    (_DST, layout.result, 3),
  )
  return kernel


@functools.cache
def convolution_images_gradient(window: Window) -> Kernel:
  """(kernel, gradient of the result) -> gradient of the images."""
  layout = _Layout(window)
  library = layout.library
  desc = library.primitive_desc(
    'convolution_backward_data',
    _AUTO,
    layout.images,
    layout.any_kernel,
    layout.result,
    *layout.geometry,
    layout.forward,
  )
  kernel = Kernel(f'convolution_images_gradient_{window}', places=3)
  weights = library.memory_of(desc, _WEIGHTS_MD)
  place = kernel.bring(layout.kernel, 0, weights)
  kernel.add(
    desc,
    (_DIFF_DST, layout.result, 1),
    (_WEIGHTS, weights, place),
    (_DIFF_SRC, layout.images, 2),
  )
  return kernel


@functools.cache
def convolution_kernel_gradient(window: Window) -> Kernel:
  """(images, gradient of the result) -> gradients of kernel and bias."""
  layout = _Layout(window)
  library = layout.library
  desc = library.primitive_desc(
    'convolution_backward_weights',
    _AUTO,
    layout.images,
    layout.any_kernel,
    layout.bias,
    layout.result,
    *layout.geometry,
    layout.forward,
  )
  kernel = Kernel(f'convolution_kernel_gradient_{window}', places=4)
  weights = library.memory_of(desc, _DIFF_WEIGHTS_MD)
  same = library.equal(weights, layout.kernel)
  place = 2 if same else kernel.reserve(weights)
  kernel.add(
    desc,
    (_SRC, layout.images, 0),
    (_DIFF_DST, layout.result, 1),
    (_DIFF_WEIGHTS, weights, place),
    (_DIFF_BIAS, layout.bias, 3),
  )
  if not same:
    kernel.reorder(weights, place, layout.kernel, 2)
  return kernel


@functools.cache
def max_pool(window: Window) -> tuple[Kernel, int]:
  """images -> (result, where), and the bytes of `where`, the places of the largest."""
  library, images, result, desc = _pooling(window)
  where = library.memory_of(desc, _WORKSPACE_MD)
  kernel = Kernel(f'max_pool_{window}', places=3)
  kernel.add(desc, (_SRC, images, 0), (_DST, result, 1), (_WORKSPACE, where, 2))
  return kernel, library.size(where)


@functools.cache
def max_pool_gradient(window: Window) -> Kernel:
  """(where, gradient of the result) -> gradient of the images."""
  library, images, result, forward = _pooling(window)
  where = library.memory_of(forward, _WORKSPACE_MD)
  desc = library.primitive_desc(
    'pooling_backward', _MAX, images, result, *_pooling_geometry(window), forward
  )
  kernel = Kernel(f'max_pool_gradient_{window}', places=3)
  kernel.add(
    desc, (_WORKSPACE, where, 0), (_DIFF_DST, result, 1), (_DIFF_SRC, images, 2)
  )
  return kernel


class _Layout:
  """Descriptors that a convolution and its gradients share."""

  def __init__(self, window: Window):
    self.library = library = library_lib.load()
    height, width, before, after = window.kernel
    self.images = _images(library, window.images)
    self.result = _images(library, window.result)
    self.bias = library.describe((after,), (1,))
    self.any_kernel = library.describe((after, before, height, width))
    self.kernel = library.describe(
      (after, before, height, width), (1, after, width * before * after, before * after)
    )
    (top, bottom), (left, right) = window.padding
    dims = library_lib.dims
    self.geometry = (
      dims(*window.strides),
      dims(0, 0),
      dims(top, left),
      dims(bottom, right),
    )
    self.forward = library.primitive_desc(
      'convolution_forward',
      _FORWARD,
      _AUTO,
      self.images,
      self.any_kernel,
      self.bias,
      self.result,
      *self.geometry,
    )


def _pooling(window: Window) -> tuple[library_lib.Library, _Desc, _Desc, _Desc]:
  library = library_lib.load()
  images, result = _images(library, window.images), _images(library, window.result)
  desc = library.primitive_desc(
    'pooling_forward', _FORWARD, _MAX, images, result, *_pooling_geometry(window)
  )
  return library, images, result, desc


def _pooling_geometry(window: Window) -> tuple[ctypes.Array, ...]:
  (top, bottom), (left, right) = window.padding
  sizes = (window.strides, window.size, (0, 0), (top, left), (bottom, right))
  return tuple(library_lib.dims(*pair) for pair in sizes)


def _images(
  library: library_lib.Library, shape: tuple[int, int, int, int]
) -> ctypes.c_void_p:
  n, height, width, channels = shape
  return library.describe(
    (n, channels, height, width),
    (height * width * channels, 1, width * channels, channels),
  )
