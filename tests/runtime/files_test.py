"""What goes wrong with a file is said with its name, and what is full with its own."""

import errno
import os

import pytest

from impala_jax.runtime import files


def no_room(path=None):
  return OSError(errno.ENOSPC, 'No space left on device', path)


def test_an_error_while_writing_names_the_file(tmp_path):
  def write():
    with files.naming(tmp_path / 'x'), open('/dev/full', 'w') as f:
      f.write('a')

  with pytest.raises(OSError, match='No space left') as error:
    write()
  assert error.value.filename == str(tmp_path / 'x')
  with pytest.raises(IsADirectoryError) as error, files.naming(tmp_path / 'x'):
    tmp_path.write_text('')
  assert error.value.filename == str(tmp_path)  # It has said so itself.


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
  path = tmp_path / 'a.json'
  files.write_json(path, {'a': 1})

  def full(*_):
    raise no_room()

  monkeypatch.setattr(os, 'replace', full)
  with pytest.raises(OSError, match=r'a\.json'):
    files.write_json(path, {'a': 2})
  assert files.read_json(path) == {'a': 1}
  assert [p.name for p in tmp_path.iterdir()] == ['a.json']


def test_a_full_disk_and_full_memory_read_differently(tmp_path, monkeypatch):
  kinds = {'/': 'ext4', '/dev/shm': 'tmpfs'}
  monkeypatch.setattr(files, '_kind', lambda mount: kinds.get(mount, 'ext4'))
  disk = files.explain(no_room(str(tmp_path / 'x')))
  assert disk.startswith(f'{tmp_path / "x"}: No space left on device: /')
  assert ' is a disk, ' in disk
  memory = files.explain(no_room('/dev/shm/x'))
  assert '/dev/shm/x: No space left' in memory
  assert '/dev/shm is memory, not a disk' in memory
  # Where the error names no file: what is full now.
  monkeypatch.setattr(files, '_is_full', lambda mount: mount == '/dev/shm')
  assert '/dev/shm is memory, not a disk' in files.explain(no_room())
  monkeypatch.setattr(files, '_is_full', lambda mount: False)
  assert files.explain(no_room()) == 'No space left on device'


def test_other_errors_in_words():
  assert files.explain(OSError(errno.EACCES, 'Permission denied', 'x')) == (
    'x: Permission denied'
  )
  assert files.explain(TimeoutError('no answer')) == 'no answer'


@pytest.mark.parametrize(
  ('text', 'name'),
  [
    ('pong-qbert', 'pong-qbert'),
    ('contributed/dmlab30/rooms', 'contributed_dmlab30_rooms'),
    ('../../x', 'x'),
    ('..', '_'),
    ('\n', '_'),
    ('игра', 'игра'),
  ],
)
def test_texts_as_parts_of_names(text, name):
  assert files.as_name(text) == name


def test_long_texts_stay_apart():
  made = {files.as_name('a' * 300 + end) for end in 'xyz'}
  assert len(made) == 3
  assert all(len(x) <= 60 for x in made)
