"""tools/setup_venv.sh ends in one line that says what to do."""

import os
import pathlib
import shutil
import socketserver
import subprocess
import sys
import threading
from http import server

import pytest

ROOT = pathlib.Path(__file__).parents[1]
UV = pathlib.Path(sys.prefix).parent / 'uv'  # The environment that tools/ made of it.


@pytest.fixture
def place(tmp_path):
  """A copy of what the script reads, with a set of one small package."""
  for folder in ('tools', 'requirements', 'bin'):
    (tmp_path / folder).mkdir()
  for name in ('setup_venv.sh', 'interpreters.sh', 'sets.sh'):
    shutil.copy(ROOT / 'tools' / name, tmp_path / 'tools')
  shutil.copy(ROOT / 'requirements' / 'uv.txt', tmp_path / 'requirements')
  (tmp_path / 'requirements' / 'latest.txt').write_text('six==1.17.0\n')
  (tmp_path / 'requirements' / 'cluster.txt').write_text('six==1.17.0\n')
  return tmp_path


@pytest.fixture
def place_with_uv(place):
  if not UV.exists():
    pytest.skip('this environment was not made by uv')
  (place / 'venvs').mkdir()
  (place / 'venvs' / 'uv').symlink_to(UV)
  return place


def run(place, name, **env):
  """Returns (exit status, its errors); pip and uv are offline, unset."""
  clean = {k: v for k, v in os.environ.items() if not k.startswith(('PIP_', 'UV_'))}
  env = {
    'PYTHON': sys.executable,
    'VENV_ROOT': str(place / 'venvs'),
    'PIP_CONFIG_FILE': os.devnull,
    'PIP_INDEX_URL': 'http://127.0.0.1:9/simple',
    'PIP_RETRIES': '1',
    'UV_CACHE_DIR': str(place / 'cache'),
    'UV_HTTP_RETRIES': '0',
    'UV_NO_CONFIG': '1',
    **env,
  }
  result = subprocess.run(
    [place / 'tools' / 'setup_venv.sh', name],
    env={**clean, **env},
    capture_output=True,
    text=True,
    timeout=120,
  )
  return result.returncode, result.stderr


def script(path, text):
  path.write_text(f'#!/bin/sh\n{text}\n')
  path.chmod(0o755)
  return str(path)


def assert_one_line(result, *parts):
  status, text = result
  assert status != 0
  assert text.count('\n') == 1
  for part in ('setup: error: ', *parts):
    assert part in text


def test_unknown_set(place):
  assert_one_line(run(place, 'new'), "'new'", 'cluster, latest')


@pytest.mark.parametrize(
  ('name', 'version', 'wanted'),
  [
    ('cluster', '3.12', 'needs Python 3.11:'),
    ('cluster', '3.9', 'needs Python 3.11:'),
    ('cluster', '3.13', 'or take SET=latest'),
    ('latest', '3.10', 'needs Python 3.11 or newer:'),
  ],
)
def test_wrong_python(place, name, version, wanted):
  python = script(place / 'python', f'echo {version}')
  result = run(place, name, PYTHON=python)
  assert_one_line(result, python, f'is Python {version}', wanted)


def test_no_python(place):
  result = run(place, 'latest', PYTHON='/no/such/python')
  assert_one_line(result, '/no/such/python', 'needs Python 3.11')


def test_no_venv_module(place):
  python = script(
    place / 'python', 'case "$2" in *ensurepip*) exit 1;; esac; echo 3.11'
  )
  result = run(place, 'latest', PYTHON=python)
  assert_one_line(result, "'apt-get install python3.11-venv'")


def test_full_disk(place):
  script(place / 'bin' / 'df', 'echo head; echo "/dev/x 9 9 100 1% /"')
  path = f'{place / "bin"}{os.pathsep}{os.environ["PATH"]}'
  result = run(place, 'latest', PATH=path)
  assert_one_line(result, 'disk too full: 100 MB free', 'needs 2100 MB')


def test_no_network_then_again(place):
  result = run(place, 'latest')
  assert_one_line(result, 'no network', 'latest.log')
  # What failed is not taken for ready the next time.
  assert_one_line(run(place, 'latest'), 'no network')


def test_no_network_for_the_set(place_with_uv):
  for _ in range(2):
    result = run(place_with_uv, 'latest')
    assert_one_line(result, 'no network', 'latest.log')
  assert (UV / 'bin' / 'uv').exists()


def test_full_disk_while_installing(place):
  uv = place / 'venvs' / 'uv'
  (uv / 'bin').mkdir(parents=True)
  (uv / 'bin' / 'python').symlink_to(sys.executable)
  script(uv / 'bin' / 'uv', 'echo "cause: No space left on device" >&2; exit 2')
  pin = (place / 'requirements' / 'uv.txt').read_bytes()
  (uv / '.installed').write_bytes(subprocess.check_output(['sha256sum'], input=pin))
  assert_one_line(run(place, 'latest'), 'disk full', 'latest.log')


def test_index_without_the_package(place_with_uv):
  class Index(server.BaseHTTPRequestHandler):
    def do_GET(self):
      self.send_error(404)

    def log_message(self, *args):
      pass

  with socketserver.TCPServer(('127.0.0.1', 0), Index) as index:
    threading.Thread(target=index.serve_forever).start()
    try:
      url = f'http://127.0.0.1:{index.server_address[1]}/simple'
      result = run(place_with_uv, 'latest', PIP_INDEX_URL=url)
    finally:
      index.shutdown()
  assert_one_line(result, 'six was not found in the package registry')


def test_another_set_up_does_not_end(place):
  script(place / 'bin' / 'flock', 'exit 1')
  path = f'{place / "bin"}{os.pathsep}{os.environ["PATH"]}'
  result = run(place, 'latest', PATH=path)
  assert_one_line(result, 'another set-up', '30 minutes')


def test_ready_is_left_alone_until_the_pins_change(place):
  venv = place / 'venvs' / 'latest'
  (venv / 'bin').mkdir(parents=True)
  (venv / 'bin' / 'python').symlink_to(sys.executable)
  pins_file = place / 'requirements' / 'latest.txt'
  checksum = subprocess.check_output(['sha256sum'], input=pins_file.read_bytes())
  (venv / '.installed').write_bytes(checksum)
  assert run(place, 'latest') == (0, '')
  assert (venv / '.installed').exists()
  pins_file.write_text('six==1.16.0\n')
  assert_one_line(run(place, 'latest'), 'no network')
  assert not (venv / '.installed').exists()


@pytest.mark.parametrize(
  ('versions', 'sets'),
  [
    (['3.11'], 'cluster latest'),
    (['3.11', '3.13'], 'cluster latest'),
    (['3.13'], 'latest'),
    (['3.12', '3.14'], 'latest'),
    (['3.9'], 'latest'),  # Whose set-up says what is missing.
    ([], 'latest'),
  ],
)
def test_sets_are_those_of_the_interpreters(place, versions, sets):
  for tool in ('bash', 'dirname'):
    (place / 'bin' / tool).symlink_to(shutil.which(tool))
  for version in versions:
    script(place / 'bin' / f'python{version}', f'echo {version}')
  env = {'PATH': str(place / 'bin')}
  told = subprocess.check_output([place / 'tools' / 'sets.sh'], env=env, text=True)
  assert told == f'{sets}\n'
  for version in versions:
    python = str(place / 'bin' / f'python{version}')
    one = subprocess.check_output(
      [place / 'tools' / 'sets.sh'], env={**env, 'PYTHON': python}, text=True
    )
    assert one == ('cluster latest\n' if version == '3.11' else 'latest\n')


def test_a_set_is_built_with_the_newest_python_that_fits_and_is_whole(place):
  for tool in ('bash', 'sh'):
    (place / 'bin' / tool).symlink_to(shutil.which(tool))
  for version, ends in (('3.14', 1), ('3.13', 0), ('3.11', 0)):  # 3.14 has no venv.
    script(place / 'bin' / f'python{version}', f'echo {version}; exit {ends}')
  text = f'source {place}/tools/interpreters.sh; python_for latest; python_for cluster'
  told = subprocess.check_output(
    ['bash', '-c', text], env={'PATH': str(place / 'bin')}, text=True
  )
  assert told.split() == ['python3.13', 'python3.11']
