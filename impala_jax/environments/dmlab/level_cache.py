"""Compiled maps of DeepMind Lab, kept on disk for many processes and hosts.

The engine compiles a map for about 20 s at the start of an episode of many levels; a
hit here takes its place. `LevelCache` is what `deepmind_lab.Lab(level_cache=...)`
takes. A directory, local or on a shared file system, holds

- `maps/<two digits>/<key>.map`: a checksum, then the engine's file. Written aside and
  renamed, so that nobody sees half of one; verified when fetched, because the engine
  ends its process where it is handed a broken file.
- `stats/<host>-<process>-….json`: what one process asked for and got. `summary` adds
  them up: engines live in processes of their own, and this is how their hit rates
  come out.

Nothing is locked. Whatever another process removes or replaces in the meantime is a
miss, and two that compile the same map write the same file.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import pathlib
import random
import re
import socket
import time
import uuid
import zipfile
from collections.abc import Iterator

import xxhash

_MAGIC = b'impala1\n'
_DIGEST = 16  # Bytes of the checksum.
_LEFTOVER = 3600.0  # Seconds after which a file written aside has lost its writer.
_STATS_KEPT = 30 * 86400.0  # Seconds.
# On average one write in so many counts the directory. Chance needs no agreement
# between hosts: however many write, the bound is overshot by about so many maps.
_WRITES_PER_COUNT = 64
_AFTER_EVICTION = 0.9  # Of the bound: room for a while.


@dataclasses.dataclass
class Stats:
  """What happened to a cache."""

  hits: int = 0
  misses: int = 0
  writes: int = 0
  evictions: int = 0
  corrupt: int = 0  # Broken entries found and removed; they count as misses, too.

  @property
  def hit_rate(self) -> float | None:
    """Share of the maps asked for that were there; None where none was asked for."""
    asked = self.hits + self.misses
    return self.hits / asked if asked else None

  def add(self, other: 'Stats') -> None:
    for field in dataclasses.fields(self):
      total = getattr(self, field.name) + getattr(other, field.name)
      setattr(self, field.name, total)


class LevelCache:
  """Maps by the engine's key. Never raises: a cache that fails is one that misses.

  A directory that cannot be written (no right, no space) is said once in the log;
  from then on this process only fetches.

  Args:
    directory: made where it is missing.
    gib: bound of the size in GiB; what was used longest ago is removed first. It is
      kept to within about a hundred maps.
    label: for `summary`, as a rule the level.
  """

  def __init__(self, directory: str | os.PathLike[str], gib: float, label: str = ''):
    self._directory = pathlib.Path(directory)
    self._bound = int(gib * 2**30)
    self._label = label
    self._stats = Stats()
    self._writable = True
    self._reported = True  # Whether `stats` can be written.
    self._uncounted = 0  # Bytes written since the directory was counted.
    self._chance = random.Random()  # From the system: differs between processes.
    me = f'{_safe(socket.gethostname())}-{os.getpid()}-{uuid.uuid4().hex[:8]}'
    self._aside_name = f'.aside-{me}'
    self._stats_path = self._directory / 'stats' / f'{me}.json'
    try:
      self._stats_path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      self._give_up(e)

  def stats(self) -> Stats:
    """What this process saw so far."""
    return dataclasses.replace(self._stats)

  @property
  def writable(self) -> bool:
    """Whether maps are kept, as far as has been seen."""
    return self._writable

  def fetch(self, key: str, pk3_path: str) -> bool:
    """Puts the map `key` at `pk3_path`; False where that cannot be done."""
    found = self._fetch(key, pathlib.Path(pk3_path))
    if found:
      self._stats.hits += 1
    else:
      self._stats.misses += 1
    self._report()
    return found

  def write(self, key: str, pk3_path: str) -> None:
    """Keeps the map at `pk3_path` as `key`."""
    if not self._writable:
      return
    try:
      content = pathlib.Path(pk3_path).read_bytes()
    except OSError:
      return  # The map compiler left nothing.
    if len(content) > self._bound or not zipfile.is_zipfile(io.BytesIO(content)):
      return  # Half a map would end every engine that fetches it.
    entry = self._entry(key)
    aside = entry.with_name(self._aside_name)
    try:
      entry.parent.mkdir(parents=True, exist_ok=True)
      with aside.open('wb') as f:
        f.write(_MAGIC + _digest(key, content) + content)
        f.flush()
        os.fsync(f.fileno())
      aside.replace(entry)
    except OSError as e:
      _remove(aside)
      self._give_up(e)
      return
    self._stats.writes += 1
    self._uncounted += len(content)
    if (
      self._chance.random() * _WRITES_PER_COUNT < 1
      or self._uncounted * _WRITES_PER_COUNT > self._bound
    ):
      self._uncounted = 0
      self._evict()
    self._report()

  def _fetch(self, key: str, target: pathlib.Path) -> bool:
    entry = self._entry(key)
    try:
      stored = entry.read_bytes()
    except OSError:
      return False
    start = len(_MAGIC) + _DIGEST
    content = stored[start:]
    if stored[:start] != _MAGIC + _digest(key, content):
      _remove(entry)
      self._stats.corrupt += 1
      return False
    try:
      target.write_bytes(content)
      if target.read_bytes() != content:
        raise OSError(f'{target} does not hold what was written')
    except OSError:
      _remove(target)
      return False
    # Somebody may have removed it, or the directory is read-only.
    with contextlib.suppress(OSError):
      os.utime(entry)  # Used now.
    return True

  def _entry(self, key: str) -> pathlib.Path:
    shard = xxhash.xxh3_64_hexdigest(_raw(key))[:2]
    return self._directory / 'maps' / shard / f'{_safe(key)}.map'

  def _evict(self) -> None:
    """Removes what was used longest ago where the directory is too large."""
    found = []  # (used, bytes, path)
    now = time.time()
    for path, stat in _files(self._directory / 'maps'):
      if not path.name.startswith('.'):
        found.append((stat.st_mtime, stat.st_size, path))
      elif now - stat.st_mtime > _LEFTOVER:
        _remove(path)
    for path, stat in _files(self._directory / 'stats'):
      if now - stat.st_mtime > _STATS_KEPT:
        _remove(path)
    total = sum(size for _, size, _ in found)
    if total <= self._bound:
      return
    for _, size, path in sorted(found):
      if total <= _AFTER_EVICTION * self._bound:
        break
      self._stats.evictions += _remove(path)
      total -= size

  def _report(self) -> None:
    if not self._reported:
      return
    aside = self._stats_path.with_suffix('.aside')
    try:
      data = {'label': self._label, **dataclasses.asdict(self._stats)}
      aside.write_text(json.dumps(data))
      aside.replace(self._stats_path)
    except OSError:
      self._reported = False  # A full or read-only directory; see `_give_up`.

  def _give_up(self, error: OSError) -> None:
    self._writable = self._reported = False
    logging.getLogger(__name__).warning(
      'level cache %s cannot be written (%s): maps that are missing there will be '
      'compiled at every start of an episode',
      self._directory,
      error.strerror or error,
    )


def default_directory() -> pathlib.Path:
  """In the user's folder of caches."""
  root = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return pathlib.Path(root) / 'impala_jax' / 'dmlab_maps'


def open_cache(directory: str, gib: float, label: str = '') -> LevelCache | None:
  """The cache of `dmlab.level_cache` and `dmlab.level_cache_gib`.

  Args:
    directory: '' for `default_directory()`.
    gib: 0 for no cache.
    label: see `LevelCache`.
  """
  if gib <= 0:
    return None
  return LevelCache(directory or default_directory(), gib, label)


def summary(directory: str | os.PathLike[str], since: float = 0.0) -> dict[str, Stats]:
  """What all processes saw that used the cache, by label.

  Args:
    directory: of the cache.
    since: leaves out processes that last used it before this time (as time.time()).
      A process counts whole or not at all.
  """
  found: dict[str, Stats] = {}
  for path, stat in _files(pathlib.Path(directory) / 'stats'):
    if path.suffix != '.json' or stat.st_mtime < since:
      continue
    try:
      data = json.loads(path.read_text())
      found.setdefault(data.pop('label'), Stats()).add(Stats(**data))
    except (OSError, ValueError, TypeError, KeyError):
      continue  # Removed meanwhile, or of another version.
  return dict(sorted(found.items()))


def _digest(key: str, content: bytes) -> bytes:
  # The key counts, too: an entry under a wrong name is a broken one.
  return xxhash.xxh3_128_digest(_raw(key) + b'\0' + content)


def _raw(text: str) -> bytes:
  return text.encode(errors='backslashreplace')


def _safe(name: str) -> str:
  """`name` as a file name; what cannot stay is replaced by a hash of the whole."""
  kept = re.sub(r'[^A-Za-z0-9_-]', '_', name)
  if kept == name and 0 < len(name) <= 128:
    return name
  return f'{kept[:100]}-{xxhash.xxh3_64_hexdigest(_raw(name))}'


def _files(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, os.stat_result]]:
  """All files below `folder` that are still there when looked at."""
  for root, _, names in os.walk(folder):
    for name in names:
      path = pathlib.Path(root, name)
      try:
        yield path, path.stat()
      except OSError:
        continue


def _remove(path: pathlib.Path) -> bool:
  """Whether this call removed it."""
  try:
    path.unlink()
  except OSError:
    return False
  return True
