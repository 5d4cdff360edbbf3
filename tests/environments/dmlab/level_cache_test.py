import json
import logging
import os
import pathlib
import random
import subprocess
import sys
import time
import zipfile

import pytest

from impala_jax.environments.dmlab import level_cache
from tests import fake_deepmind_lab as fake

KEY = 'lt_procedural_aas_0123456789abcdef0123456789abcdef'
MIB = 2**20 / 2**30  # In GiB.


def write_map(path, content=b'a map', size=0):
  """A file as the map compiler leaves it."""
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('maps/lt_procedural.bsp', content + bytes(size))
  return path.read_bytes()


@pytest.fixture
def source(tmp_path):
  path = tmp_path / 'source.pk3'
  write_map(path)
  return path


def make(tmp_path, gib=1.0, label=''):
  return level_cache.LevelCache(tmp_path / 'cache', gib, label)


def entries(tmp_path):
  return sorted((tmp_path / 'cache' / 'maps').rglob('*.map'))


def test_what_was_written_is_fetched(tmp_path, source):
  target = tmp_path / 'target.pk3'
  cache = make(tmp_path)
  assert cache.fetch(KEY, str(target)) is False
  assert not target.exists()
  cache.write(KEY, str(source))
  for reader in (cache, make(tmp_path)):  # In the same and in another process.
    assert reader.fetch(KEY, str(target)) is True
    assert target.read_bytes() == source.read_bytes()
    target.unlink()
  assert cache.fetch('another', str(target)) is False
  assert cache.stats() == level_cache.Stats(hits=1, misses=2, writes=1)
  assert cache.stats().hit_rate == pytest.approx(1 / 3)


def _truncate(data):
  return data[:-1]


def _flip(data):
  middle = len(data) // 2
  return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _empty(data):
  return b''


def _plain(data):
  return data[24:]  # Without its checksum.


def _extend(data):
  return data + b'\0'


@pytest.mark.parametrize('damage', [_truncate, _flip, _empty, _plain, _extend])
def test_a_broken_entry_is_removed_and_counted(tmp_path, source, damage):
  cache = make(tmp_path)
  cache.write(KEY, str(source))
  (entry,) = entries(tmp_path)
  entry.write_bytes(damage(entry.read_bytes()))
  target = tmp_path / 'target.pk3'
  assert cache.fetch(KEY, str(target)) is False
  assert not target.exists()
  assert not entries(tmp_path)
  assert cache.stats() == level_cache.Stats(misses=1, writes=1, corrupt=1)
  cache.write(KEY, str(source))
  assert cache.fetch(KEY, str(target)) is True


def test_an_entry_under_a_wrong_name_is_a_broken_one(tmp_path, source):
  cache = make(tmp_path)
  cache.write(KEY, str(source))
  (entry,) = entries(tmp_path)
  wrong = cache._entry('another')
  wrong.parent.mkdir(exist_ok=True)
  entry.rename(wrong)
  assert cache.fetch('another', str(tmp_path / 'target.pk3')) is False
  assert cache.stats().corrupt == 1


def test_a_target_that_cannot_be_written_is_a_miss(tmp_path, source):
  cache = make(tmp_path)
  cache.write(KEY, str(source))
  assert cache.fetch(KEY, str(tmp_path / 'missing' / 'target.pk3')) is False
  assert len(entries(tmp_path)) == 1  # The entry is sound.


@pytest.mark.parametrize('content', [None, b'', b'half a map'])
def test_what_is_no_map_is_not_kept(tmp_path, content, caplog):
  path = tmp_path / 'source.pk3'
  if content is not None:
    path.write_bytes(content)
  cache = make(tmp_path)
  cache.write(KEY, str(path))
  assert not entries(tmp_path)
  assert cache.stats().writes == 0
  assert not caplog.records
  write_map(path)
  cache.write(KEY, str(path))  # Nothing was wrong with the cache.
  assert cache.stats().writes == 1


@pytest.mark.parametrize(
  'key',
  ['../../outside', '/etc/passwd', '.hidden', '', 'a b', 'x' * 300, 'ü', 'a.b', 'a/b'],
)
def test_keys_stay_inside(tmp_path, source, key):
  cache = make(tmp_path)
  cache.write(key, str(source))
  (entry,) = entries(tmp_path)
  assert entry.parent.parent == tmp_path / 'cache' / 'maps'
  assert not entry.name.startswith('.')
  assert cache.fetch(key, str(tmp_path / 'target.pk3'))
  assert not cache.fetch('a_b', str(tmp_path / 'target.pk3'))  # Alike, not the same.


def test_the_bound_holds_and_the_oldest_go_first(tmp_path):
  cache = make(tmp_path, gib=MIB)
  path = tmp_path / 'source.pk3'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('m', random.Random(0).randbytes(100_000))
  for i in range(30):
    cache.write(f'key{i}', str(path))
    entry = cache._entry(f'key{i}')
    os.utime(entry, (1000 + i, 1000 + i))
    if i == 8:  # Used again: must outlive those after it.
      assert cache.fetch('key0', str(tmp_path / 'target.pk3'))
    total = sum(e.stat().st_size for e in entries(tmp_path))
    assert total <= 2**20
  kept = {e.stem for e in entries(tmp_path)}
  assert 'key0' in kept
  assert {'key28', 'key29'} <= kept
  assert not kept & {f'key{i}' for i in range(1, 20)}
  assert cache.stats().evictions == 30 - len(kept)


def test_an_entry_appears_at_once_or_not_at_all(tmp_path, source, monkeypatch):
  """The writer dies before it renames: nobody sees what it wrote."""
  cache = make(tmp_path)
  flushed = []
  inner = os.fsync

  def fsync(descriptor):
    flushed.append(len(entries(tmp_path)))
    inner(descriptor)

  def replace(self, target):
    raise OSError(5, 'Input/output error')

  monkeypatch.setattr(os, 'fsync', fsync)
  monkeypatch.setattr(pathlib.Path, 'replace', replace)
  cache.write(KEY, str(source))
  assert flushed == [0]
  assert not entries(tmp_path)


def test_a_map_larger_than_the_bound_is_not_kept(tmp_path, source):
  cache = make(tmp_path, gib=1e-9)
  cache.write(KEY, str(source))
  assert not entries(tmp_path)


def test_leftovers_of_dead_writers_are_removed(tmp_path, source):
  cache = make(tmp_path)
  cache.write(KEY, str(source))
  folder = entries(tmp_path)[0].parent
  old, new = folder / '.aside-old', folder / '.aside-new'
  statistics = tmp_path / 'cache' / 'stats' / 'old.json'
  for path in (old, new, statistics):
    path.write_bytes(b'x')
  long_ago = time.time() - 90 * 86400
  for path in (old, statistics):
    os.utime(path, (long_ago, long_ago))
  cache._evict()
  assert not old.exists()
  assert not statistics.exists()
  assert new.exists()
  assert len(entries(tmp_path)) == 1


def test_files_that_vanish_while_they_are_looked_at(tmp_path, source, monkeypatch):
  """Another host evicts at the same time."""
  cache = make(tmp_path, gib=1.0)
  for i in range(5):
    cache.write(f'key{i}', str(source))
  inner = level_cache._files

  def files(folder):
    found = list(inner(folder))
    for path, _ in found[::2]:
      path.unlink()
    return iter(found)

  monkeypatch.setattr(level_cache, '_files', files)
  cache._bound = 1
  cache._evict()
  assert not entries(tmp_path)
  assert cache.stats().evictions == 2  # The others were not its own.


class TestUnwritable:
  def file_in_the_way(self, tmp_path, source, monkeypatch):
    (tmp_path / 'cache').write_text('not a directory')
    return make(tmp_path)

  def full_disk(self, tmp_path, source, monkeypatch):
    cache = make(tmp_path)
    cache.write(KEY, str(source))

    def fsync(_):
      raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', fsync)
    return cache

  @pytest.mark.parametrize('kind', ['file_in_the_way', 'full_disk'])
  def test_one_warning_then_no_writes(
    self, tmp_path, source, monkeypatch, caplog, kind
  ):
    with caplog.at_level(logging.WARNING):
      cache = getattr(self, kind)(tmp_path, source, monkeypatch)
      for i in range(3):
        cache.write(f'key{i}', str(source))
        assert not cache.fetch(f'key{i}', str(tmp_path / 'target.pk3'))
    assert len(caplog.records) == 1
    assert str(tmp_path / 'cache') in caplog.text
    found = cache.fetch(KEY, str(tmp_path / 'target.pk3'))
    assert found == (kind == 'full_disk')  # What is there is still fetched.
    assert not list(tmp_path.rglob('.aside*'))


def test_summary_over_processes(tmp_path, source):
  first, second = make(tmp_path, label='a'), make(tmp_path, label='a')
  other = make(tmp_path, label='b')
  target = str(tmp_path / 'target.pk3')
  first.fetch(KEY, target)
  first.write(KEY, str(source))
  for _ in range(3):
    second.fetch(KEY, target)
  other.fetch('other', target)
  directory = tmp_path / 'cache'
  assert level_cache.summary(directory) == {
    'a': level_cache.Stats(hits=3, misses=1, writes=1),
    'b': level_cache.Stats(misses=1),
  }
  (directory / 'stats' / 'broken.json').write_text('{"label": "a", "hi')
  (directory / 'stats' / 'other.json').write_text(json.dumps({'label': 'a', 'x': 1}))
  assert set(level_cache.summary(directory)) == {'a', 'b'}
  assert level_cache.summary(directory, since=time.time() + 60) == {}
  assert level_cache.summary(tmp_path / 'missing') == {}


def test_open_cache(tmp_path, monkeypatch):
  assert level_cache.open_cache(str(tmp_path), 0.0) is None
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'user'))
  assert level_cache.open_cache('', 1.0) is not None
  assert level_cache.default_directory().is_dir()
  assert tmp_path in level_cache.default_directory().parents


_HAMMER = """
import random, sys, zipfile
from impala_jax.environments.dmlab import level_cache
directory, seed = sys.argv[1], int(sys.argv[2])
cache = level_cache.LevelCache(directory, 0.4 / 1024, 'hammer')
rng = random.Random(seed)
source, target = f'{directory}/../{seed}.pk3', f'{directory}/../{seed}.out'
print('ready', flush=True)
sys.stdin.readline()
for _ in range(150):
  key = rng.randrange(30)
  content = random.Random(key).randbytes(20_000)
  if cache.fetch(f'key{key}', target):
    with zipfile.ZipFile(target) as archive:
      assert archive.read('map') == content
  else:
    with zipfile.ZipFile(source, 'w') as archive:
      archive.writestr('map', content)
    cache.write(f'key{key}', source)
stats = cache.stats()
assert not stats.corrupt, stats
assert stats.hits and stats.writes, stats
"""


def test_many_processes_at_once(tmp_path):
  """Four read, write and evict the same thirty maps, of which half fit."""
  directory = tmp_path / 'cache'
  directory.mkdir()
  root = pathlib.Path(fake.__file__).parents[1]
  pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE}
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', _HAMMER, str(directory), str(i)],
      cwd=root,
      stderr=subprocess.PIPE,
      text=True,
      **pipes,
    )
    for i in range(4)
  ]
  try:
    for p in processes:
      assert p.stdout.readline() == 'ready\n'
    for p in processes:
      p.stdin.write('\n')
      p.stdin.flush()
    for p in processes:
      _, errors = p.communicate(timeout=120)
      assert p.returncode == 0, errors
  finally:
    for p in processes:
      p.kill()
      p.wait()
  total = level_cache.summary(directory)['hammer']
  assert total.hits + total.misses == 600
  assert total.evictions > 0
  size = sum(e.stat().st_size for e in entries(tmp_path))
  assert size <= 0.4 * 2**20 + 64 * 21_000
  assert not list(directory.rglob('.aside*'))
