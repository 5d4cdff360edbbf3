"""Small files that several processes share: JSON, whole or by lines.

And what went wrong with a file, in words.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

_SHARED_MEMORY = '/dev/shm'


def write_json(path: pathlib.Path, data: Any, secret: bool = False) -> None:
  """Writes aside and renames, so that a reader never sees half a file.

  Args:
    path: of the file.
    data: what JSON can hold.
    secret: only the user of this process may read it.
  """
  aside = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    if secret:  # From the first byte on.
      aside.unlink(missing_ok=True)
      os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    aside.write_text(json.dumps(data, indent=1))
    os.replace(aside, path)
  except OSError as e:
    with contextlib.suppress(OSError):
      aside.unlink(missing_ok=True)
    raise OSError(e.errno, e.strerror, os.fspath(path)) from e


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """What `write_json` wrote; empty if it is not there."""
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError):
    return {}
  return found if isinstance(found, dict) else {}


def cut_json_lines(
  path: pathlib.Path, aside: pathlib.Path, after: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
  """Ends a `.jsonl` file before the first record that is `after` where a run goes on.

  A last line that a crash has cut off goes, too: else the next record would be glued to
  it. What goes is added to the file `aside`, so that nothing is lost.

  Returns:
    The last record that stays; empty where there is none.
  """
  last: dict[str, Any] = {}
  end = 0
  if not path.exists():
    return last
  with open(path, 'rb') as f:
    for line in f:
      record = _record(line)
      if not line.endswith(b'\n') or (record and after(record)):
        break
      last, end = record or last, end + len(line)
    f.seek(end)
    lost = f.read()
  if lost:
    with open(aside, 'ab') as f:
      f.write(lost if lost.endswith(b'\n') else lost + b'\n')
    os.truncate(path, end)
  return last


def _record(line: bytes) -> dict[str, Any]:
  try:
    found = json.loads(line)
  except (ValueError, RecursionError):
    return {}
  return found if isinstance(found, dict) else {}


def read_json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Records of a `.jsonl` file; a line cut off by a crash is skipped."""
  lines = path.read_bytes().splitlines() if path.exists() else []
  return [record for record in map(_record, lines) if record]


def as_name(text: str, longest: int = 60) -> str:
  """`text` as a part of a file's name: without slashes, and not too long."""
  plain = re.sub(r'[^\w.=+-]+', '_', text).strip('._') or '_'
  if len(plain.encode()) > longest:
    # What differs further on still differs.
    kept = plain.encode()[: longest - 9].decode(errors='ignore')
    plain = f'{kept}-{zlib.crc32(text.encode()):08x}'
  return plain


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
  """An error of the system within names `path`, where it names no file itself.

  Writing to an open file raises such.
  """
  try:
    yield
  except OSError as e:
    if e.filename is not None or e.errno is None:
      raise
    raise OSError(e.errno, e.strerror, os.fspath(path)) from e


def what_is_full(*paths: str) -> str:
  """Which file systems of `paths`, of temporary files and of shared memory are full.

  In words; empty where none is.
  """
  places = [*paths, os.getcwd(), tempfile.gettempdir(), _SHARED_MEMORY]
  full = dict.fromkeys(m for m in map(_mount, places) if _is_full(m))
  return '; '.join(map(_usage, full))


def explain(error: OSError) -> str:
  """One line: the file, what is wrong with it, and where no room is left, what is full.

  A full /dev/shm, which is memory, has the system's same words as a full disk.
  """
  words = error.strerror or str(error)
  if error.filename is not None:
    words = f'{os.fsdecode(error.filename)}: {words}'
  if error.errno not in (errno.ENOSPC, errno.EDQUOT):
    return words
  if error.filename is not None:
    return f'{words}: {_usage(_mount(os.fsdecode(error.filename)))}'
  full = what_is_full()
  return f'{words}: {full}' if full else words


def _mount(path: str) -> str:
  """Where the file system begins that holds `path`."""
  path = os.path.realpath(path)
  while not os.path.ismount(path):
    path = os.path.dirname(path)
  return path


def _is_full(mount: str) -> bool:
  found = os.statvfs(mount)
  return found.f_bavail * found.f_frsize < 2**20 or (
    found.f_files > 0 and not found.f_favail
  )


def _usage(mount: str) -> str:
  """The file system in words: memory or disk, and how much of it is in use."""
  found = os.statvfs(mount)
  total, left = (n * found.f_frsize for n in (found.f_blocks, found.f_bavail))
  size, unit = (2**30, 'GiB') if total >= 2**30 else (2**20, 'MiB')
  kind = 'memory, not a disk' if _kind(mount) in ('tmpfs', 'ramfs') else 'a disk'
  words = (
    f'{mount} is {kind}, {left / size:.2f} of its {total / size:.2f} {unit} are free'
  )
  if found.f_files > 0 and not found.f_favail:
    words += ', but it has room for no more files'
  return words


def _kind(mount: str) -> str:
  """Of a file system, as the kernel names it; empty where that is not known."""
  try:
    lines = pathlib.Path('/proc/mounts').read_text().splitlines()
  except OSError:
    return ''
  kinds = [line.split()[2] for line in lines if line.split()[1] == mount]
  return kinds[-1] if kinds else ''
