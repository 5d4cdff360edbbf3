"""A run's name is its own: whatever its directory is called, copied or moved to."""

import concurrent.futures
import re
import shutil

import pytest

from impala_jax.launching import run_name
from impala_jax.launching.backends import backend
from impala_jax.runtime.run_directory import RunDirectory
from tests.launching import programs

_LEGAL = re.compile(r'[a-z][-a-z0-9]{0,38}[a-z0-9]')
_FOLDERS = (
  'catch-1',
  'Small_Breakout.2026',
  '--',
  '实验',
  'x' * 80 + '1',
  'x' * 80 + '2',
  '-' * 29,
  'ĄB ',
  '2026',
  'a\udcffb',
  'breakout-' * 20,
)


def test_names_are_legal_and_their_own(tmp_path):
  names = set()
  for parent in ('alice', 'bob'):
    for folder in _FOLDERS:
      run_dir = tmp_path / parent / folder
      run_dir.mkdir(parents=True)
      name = run_name.ensure(run_dir)
      assert _LEGAL.fullmatch(name), name
      assert run_name.ensure(run_dir) == run_name.name_of(run_dir) == name
      names.add(name)
  assert len(names) == 2 * len(_FOLDERS)


def test_the_folder_is_recognised(tmp_path):
  run_dir = tmp_path / 'Small_Breakout.2026'
  run_dir.mkdir()
  assert run_name.ensure(run_dir).startswith('impala-small-breakout-2026-')


def test_one_that_has_not_begun_has_no_name(tmp_path):
  assert run_name.read(tmp_path / 'run') == ''
  assert run_name.name_of(tmp_path / 'run') == 'impala-run-0000000000'
  assert not (tmp_path / 'run').exists()


def test_all_who_ask_at_once_agree(tmp_path):
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    names = set(pool.map(lambda _: run_name.ensure(tmp_path), range(64)))
  assert len(names) == 1


def test_one_that_moves_keeps_its_name_and_a_copy_gets_its_own(tmp_path):
  run_dir = tmp_path / 'run'
  run_dir.mkdir()
  name = run_name.ensure(run_dir)
  copy = shutil.copytree(run_dir, tmp_path / 'copy')
  assert run_name.read(copy) == ''
  other = run_name.ensure(copy)
  assert other not in ('', name)
  assert run_name.ensure(copy) == other
  assert run_name.ensure(run_dir) == name
  moved = run_dir.rename(tmp_path / 'moved')
  assert run_name.ensure(moved) == name
  # Another run where it was.
  run_dir.mkdir()
  assert run_name.ensure(run_dir) != name
  assert run_name.ensure(moved) == name
  (tmp_path / 'link').symlink_to(moved)
  assert run_name.ensure(tmp_path / 'link') == name


def test_one_may_be_given(tmp_path):
  RunDirectory(tmp_path).run_name.write_text('{"name": "impala-run1"}')
  assert run_name.ensure(tmp_path) == 'impala-run1'


@pytest.mark.parametrize(
  'text', ['', '[]', '{}', 'x', '{"name": 3}', '{"name": "A b"}', '{"name": "x\\n"}']
)
def test_a_name_that_will_not_do(tmp_path, text, monkeypatch):
  monkeypatch.setattr(run_name, '_WHOLE', 0.0)
  RunDirectory(tmp_path).run_name.write_text(text)
  with pytest.raises(run_name.RunNameError, match=r'run_name\.json'):
    run_name.ensure(tmp_path)


def test_what_was_submitted_is_not_managed_by_a_copy(tmp_path):
  run_dir = tmp_path / 'run'
  run_dir.mkdir()
  name = run_name.ensure(run_dir)
  program = programs.make(str(run_dir), name=name)
  backend.Launch('local', {}, program, {}).write()
  copy = shutil.copytree(run_dir, tmp_path / 'copy')
  assert backend.read_launch(run_dir).program.name == name
  with pytest.raises(backend.BackendError, match=r"copy': it is a copy of .*run'"):
    backend.read_launch(copy)
