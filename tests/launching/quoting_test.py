"""Whatever a directory is called and options say, each engine reads back just that."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from impala_jax import config as config_lib
from impala_jax.distributed.security import keys, tunnel
from impala_jax.launching import backends
from impala_jax.launching.backends import backend
from tests.launching import programs

# What shells, sbatch, YAML and Kubernetes look at, and scripts of people.
_CHARACTERS = ' \'"\\%$`#!&|;:,=()[]{}<>*?~^@+-.0aZé实🙂\u2028\u200b'
_texts = st.text(_CHARACTERS, max_size=12).map(str.strip)
# As settings are read, and names of files may be.
_folders = _texts.filter(lambda x: x and x not in ('.', '..'))
_slurm_folders = _folders.filter(lambda x: '\\' not in x)
_PROGRAM = programs.make()
_SUPERVISE = 'impala_jax.launching.supervise'
_TEXT_OPTIONS = ('partition', 'account', 'qos', 'constraint', 'time_limit')


def sbatch_reads(script):
  """The arguments that sbatch takes from a script, as its `get_argument` does."""
  found = []
  for line in script.split('\n'):
    if not line.startswith('#SBATCH'):
      if line.strip() and not line.startswith('#'):
        break
      continue
    rest = line.removeprefix('#SBATCH')
    while rest := rest.lstrip():
      assert not rest.startswith(':')
      word, i, quote = '', 0, ''
      while i < len(rest) and (quote or not rest[i].isspace()):
        c = rest[i]
        if c == '\\':
          i += 1
          word += rest[i]
        elif quote and c == quote:
          quote = ''
        elif not quote and c in '"\'':
          quote = c
        elif not quote and c == '#':
          rest = rest[:i]
          break
        else:
          word += c
        i += 1
      assert not quote
      found.append(word)
      rest = rest[i:]
  return found


def slurm_writes_to(pattern, **values):
  """The file of --output=`pattern`."""
  assert '\\' not in pattern  # Else it would be taken as it is.
  return re.sub('%(.)', lambda m: '%' if m[1] == '%' else values[m[1]], pattern)


def kubernetes_reads(words):
  """As it does before it starts a command; none of ours is of a variable."""
  assert not any(re.search(r'(?<!\$)(\$\$)*\$\(', word) for word in words)
  return [word.replace('$$', '$') for word in words]


@settings(max_examples=150, deadline=None)
@given(_slurm_folders, _folders, st.tuples(*[_texts] * 5), st.lists(_texts), _texts)
def test_slurm(folder, python, texts, extra, setup):
  chosen = dict(zip(_TEXT_OPTIONS, texts, strict=True))
  given = [f'slurm.{k}={v}' for k, v in chosen.items()]
  given += [f'slurm.extra={shlex.join(extra)}', f'slurm.setup={setup}']
  program = dataclasses.replace(_PROGRAM, run_dir=f'/shared/{folder}/run')
  files = backends.get('slurm', [*given, f'slurm.python=/bin/{python}']).render(program)
  found = sbatch_reads(files['learner.sbatch'])
  said = dict(x.removeprefix('--').partition('=')[::2] for x in found)
  for name, text in chosen.items():
    assert said.get({'time_limit': 'time'}.get(name, name), '') == text
  assert found[len(found) - len(extra) :] == extra
  output = slurm_writes_to(said['output'], x='job', j='7')
  assert output == f'/shared/{folder}/run/logs/slurm-job-7.out'
  lines = files['learner.sbatch'].split('\n')
  shell = [shlex.split(x) for x in lines if x and x[0] != '#']
  assert ['export', f'IMPALA_RUN_DIR=/shared/{folder}/run'] in shell
  assert shell[-1][:4] == ['exec', f'/bin/{python}', '-m', _SUPERVISE]
  if setup:
    assert shell[-2] == ['eval', setup]


@settings(max_examples=40, deadline=None)  # YAML is slow.
@given(_folders, _folders, _texts, _texts.filter(bool))
def test_kubernetes(folder, python, setup, text):
  options = ['work_dir', 'storage_class', 'accelerator']
  given = [f'kubernetes.{k}={text}' for k in options]
  given += [f'kubernetes.setup={setup}', f'kubernetes.python=/bin/{python}']
  program = dataclasses.replace(_PROGRAM, run_dir=f'/shared/{folder}/run')
  files = backends.get('kubernetes', given).render(program)
  objects = {n: yaml.safe_load(t) for n, t in files.items()}
  assert objects['0-volume.yaml']['spec']['storageClassName'] == text
  (container,) = objects['6-actor.yaml']['spec']['template']['spec']['containers']
  assert container['workingDir'] == text
  command = kubernetes_reads(container['command'])
  if setup:
    assert shlex.split(command[2]) == ['eval', setup, 'exec', '$@']
    command = command[4:]
  assert command[:3] == [f'/bin/{python}', '-m', _SUPERVISE]


@settings(max_examples=100, deadline=None)
@given(_folders, _folders)
def test_this_machine(folder, python):
  program = dataclasses.replace(_PROGRAM, run_dir=f'/shared/{folder}/run')
  engine = backends.get('local', [f'local.python=/bin/{python}'])
  lines = engine.render(program)['plan.sh'].split('\n')
  assert shlex.split(lines[1]) == ['export', f'IMPALA_RUN_DIR=/shared/{folder}/run']
  assert shlex.split(lines[3]) == [*engine.commands(program)[0], '&']


@settings(max_examples=100, deadline=None)
@given(_folders)
def test_stunnel(folder):
  path = pathlib.Path(f'/shared/{folder}/learner.key')
  text = tunnel.render_server(keys.Keys(path, path, path), '::', 1, 2)
  assert text.split('\n')[-2] == f'key = {path}'


@settings(max_examples=25, deadline=None)
@given(_slurm_folders.filter(lambda x: '/' not in x), _texts)
def test_a_shell_runs_what_is_meant(tmp_path_factory, folder, said):
  base = tmp_path_factory.mktemp('shell')
  (base / folder).mkdir()
  python = base / folder / 'python'
  python.write_text(
    f'#!{sys.executable}\nimport json, os, sys\n'
    'print(json.dumps([sys.argv[1:], os.environ["IMPALA_RUN_DIR"], '
    'os.environ["SAID"]]))\n'
  )
  python.chmod(0o755)
  program = dataclasses.replace(_PROGRAM, run_dir=str(base / folder))
  engine = backends.get(
    'slurm', [f'slurm.python={python}', f'slurm.setup=export SAID={shlex.quote(said)}']
  )
  engine.write_files(program, engine.render(program))
  done = subprocess.run(
    ['bash', base / folder / 'launch' / 'learner.sbatch'],
    stdout=subprocess.PIPE,
    timeout=60,
    check=True,
  )
  argv, run_dir, heard = json.loads(done.stdout)
  assert (argv[1], run_dir, heard) == (_SUPERVISE, str(base / folder), said)
  assert argv[argv.index('--') + 1] == str(python)


@pytest.mark.parametrize('setup', ['cat <<end', "echo '", 'true \\', 'set -- a #'])
def test_a_setup_cannot_swallow_the_command(setup):
  script = backends.get(
    'slurm', ['slurm.python=/bin/echo', f'slurm.setup={setup}']
  ).render(programs.make())['learner.sbatch']
  done = subprocess.run(
    ['bash'], input=script, capture_output=True, text=True, timeout=60, check=False
  )
  # It runs, or the job fails; no job ends well without it.
  assert done.returncode or _SUPERVISE in done.stdout


@pytest.mark.parametrize('launcher', backends.LAUNCHERS)
@pytest.mark.parametrize('character', '\n\r\t\0\x1b\x7f\x85')
def test_control_characters_are_refused_in_every_option(launcher, character):
  kind = type(getattr(backends._AllOptions(), launcher))
  texts = [n for n, x in vars(kind()).items() if isinstance(x, str | tuple)]
  assert 'setup' in texts
  for name in texts:
    setting = f'{launcher}.{name}=a{character}b'
    words = re.escape(f'{launcher}.{name} is ') + '.*must hold no control characters'
    with pytest.raises(config_lib.ConfigError, match=words):
      backends.get(launcher, [setting])


@pytest.mark.parametrize('extra', ['--comment="a', 'a\\'])
def test_more_arguments_are_whole(extra):
  words = r'slurm\.extra is .*: must be arguments, quoted as in a shell'
  with pytest.raises(config_lib.ConfigError, match=words):
    backends.get('slurm', [f'slurm.extra={extra}'])


def test_what_slurm_would_take_for_no_pattern_is_refused():
  with pytest.raises(backend.BackendError, match='must hold no backslash on Slurm'):
    backends.get('slurm').render(programs.make('/shared/a\\b'))


def test_bytes_that_are_no_text_come_through(tmp_path):
  folder = os.fsdecode(bytes(tmp_path) + b'/\xff')
  engine = backends.get('slurm')
  program = programs.make(folder)
  engine.write_files(program, engine.render(program))
  script = (pathlib.Path(folder) / 'launch' / 'learner.sbatch').read_bytes()
  assert b'/\xff/logs/slurm-%x-%j.out"' in script
  engine.new_launch(program, {})
  assert backend.read_launch(pathlib.Path(folder)).program.run_dir == folder
