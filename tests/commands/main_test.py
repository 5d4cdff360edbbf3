"""The console command as a whole: help, lists, completion, mistakes."""

import os
import subprocess
import sys

import pytest

import impala_jax
from impala_jax import configs
from impala_jax.commands import arguments, main


def run(capsys, *argv):
  """(exit code, stdout, stderr) of `impala ...` in this process."""
  try:
    code = main.main(argv)
  except SystemExit as e:
    code = e.code
  printed = capsys.readouterr()
  return code, printed.out, printed.err


def test_help_has_a_line_for_each_command(capsys):
  code, out, err = run(capsys, '--help')
  assert (code, err) == (0, '')
  for name, text in main.COMMANDS.items():
    assert f'{name} {text}' in ' '.join(out.split())
  assert run(capsys) == (2, out, '')


@pytest.mark.parametrize('name', main.COMMANDS)
def test_every_command_has_help(capsys, name):
  code, out, err = run(capsys, name, '--help')
  assert (code, err) == (0, '')
  assert out.startswith(f'usage: python -m impala_jax {name}')
  assert 'absl' not in out.lower()
  assert '%' not in out
  parser = main.whole_parser('impala', [name])
  flags = [a for a in arguments.actions(parser) if a.option_strings]
  flags = [a for a in flags if a.dest not in ('help', 'version')]
  assert flags or name in ('plot', 'completion')
  for flag in flags:
    assert 'Default: ' in flag.help, flag.dest
    assert flag.option_strings[0] in out


def test_training_has_its_flags_in_groups(capsys):
  _, out, _ = run(capsys, 'train', '--help')
  heads = ['what to train:', 'settings:', 'the run:', 'where it runs:']
  places = [out.index(f'\n{head}\n') for head in heads]
  assert places == sorted(places)


def test_help_loads_nothing_that_it_does_not_need():
  script = (
    'import sys\n'
    'from impala_jax.commands import main\n'
    "main.main(['--help'])\n"
    "print(sorted({'jax', 'numpy', 'rich'} & set(sys.modules)))\n"
  )
  done = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, timeout=60
  )
  assert done.stdout.splitlines()[-1] == '[]', done.stderr


def test_version(capsys):
  assert run(capsys, '--version') == (0, f'impala_jax {impala_jax.__version__}\n', '')


@pytest.mark.parametrize(
  ('argv', 'words'),
  [
    (['trian'], 'did you mean train?'),
    (['xyz'], 'there are train, dmlab30, '),
    (['train', '--sed=1'], 'did you mean --seed?'),
    (['manage'], 'required: COMMAND, DIR\n'),
    (['manage', 'restart', 'x'], 'must be one of status, logs, scale, stop'),
    (['list', 'level'], 'must be one of configs, suites, levels, settings'),
    (['list', 'levels', '--suite=atri'], 'must be one of atari, catch'),
    (['compare', 'x'], '--out is missing'),
    (['completion', 'tcsh'], 'must be one of bash, zsh, fish'),
    (['train', '--game='], '--game=: must be names separated by commas, none of'),
    (['train', '--game=pong,,qbert'], 'must be names separated by commas, none of'),
    (['train', '--game=pong,qbert,pong'], 'must name each once'),
    (['train', '--seed', '9' * 40], 'must be below 2^63'),
    (['train', '--seed', '9' * 5000], '99: must be a whole number'),
    (['evaluate', '--processes=99999999999'], 'must be at most 4,096'),
    (['fill_level_cache', '--timeout=nan'], '--timeout=nan: must be finite'),
    (['fill_level_cache', '--level_cache_gib=inf'], 'must be finite'),
  ],
)
def test_mistakes_get_one_clear_line(capsys, argv, words):
  code, out, err = run(capsys, *argv)
  assert (code, out) == (2, '')
  assert words in err
  assert err.startswith('impala_jax: ')
  assert err.count('\n') == 1


@pytest.mark.parametrize(
  'argv',
  [
    ('train', '--config=catch', '--transport=local', '--run_dir={}'),
    ('train', '--resume', '--run_dir={}'),
    ('train', '--config=./{}'),
    ('evaluate', '--run_dir={}'),
    ('evaluate', '--checkpoint={}'),
    ('plot', '{}'),
    ('compare', '--out=x.png', '{}'),
    ('manage', 'status', '{}'),
  ],
)
def test_a_name_too_long_for_any_file(capsys, tmp_path, monkeypatch, argv):
  monkeypatch.chdir(tmp_path)
  code, out, err = run(capsys, *(x.format('a' * 300) for x in argv))
  assert code in (1, 2)
  assert out == ''
  assert 'File name too long' in err
  assert err.startswith('impala_jax: ')
  assert 'Traceback' not in err
  assert list(tmp_path.iterdir()) == []


def test_files_of_another_kind(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  deep = tmp_path / 'deep'
  deep.mkdir()
  for name in ('config.json', 'metrics.jsonl', 'launch.json'):
    (deep / name).write_text('[' * 100_000)
  odd = tmp_path / 'odd'
  odd.mkdir()
  (odd / 'metrics.jsonl').write_bytes(
    b'\xff\n5\n{"frames": 1}\n{"episode_return": 1}\n'
  )
  (odd / 'config.json').write_text('{"config": []}')
  for folder in ('deep', 'odd'):
    for argv in (
      ('train', '--resume', f'--run_dir={folder}'),
      ('train', f'--config={folder}/config.json', '--check'),
      ('plot', folder),
      ('compare', '--out=x.png', folder),
      ('evaluate', f'--run_dir={folder}'),
      ('manage', 'status', folder),
    ):
      code, out, err = run(capsys, *argv)
      assert code in (1, 2), argv
      assert out == '', argv
      assert err.startswith('impala_jax: '), argv


@pytest.mark.parametrize(
  ('argv', 'words'),
  [
    (['--config='], "--config='' is unknown"),
    (['--config=catch', '--set=--'], "'--': write section.field=value"),
    (['--config=catch', '--launcher_set=slurm.qos=x'], 'has no effect'),
    (['--config=catch', '--launcher=--'], 'must be one of foreground'),
    (['--config=catch', '--run_dir=/dev/null'], '/dev/null is no directory'),
    (['--config=catch', f'--run_dir={"a" * 300}'], 'File name too long'),
    (['--config=catch', f'--set={"a" * 5000}=1'], 'unknown setting'),
  ],
)
def test_a_check_does_not_pass_what_would_be_refused(capsys, argv, words):
  code, out, err = run(capsys, 'train', '--transport=local', '--check', *argv)
  assert (code, out) == (2, '')
  assert words in err
  assert len(err) < 1500


def test_a_missing_package_gets_one_clear_line():
  script = (
    'import sys\n'
    "sys.modules['numpy'] = None\n"
    'from impala_jax.commands import main\n'
    "sys.exit(main.main(['train', '--check']))\n"
  )
  done = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, timeout=60
  )
  assert done.returncode == 2
  assert "has no module 'numpy'" in done.stderr
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(
  'argv', ['list settings', 'train --help', '--help', 'completion bash']
)
def test_what_is_printed_may_be_read_in_part(argv):
  """As `| head` does."""
  reader, writer = os.pipe()
  os.close(reader)
  command = [sys.executable, '-m', 'impala_jax', *argv.split()]
  try:
    done = subprocess.run(
      command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
  finally:
    os.close(writer)
  assert (done.returncode, done.stderr) == (0, '')


@pytest.mark.parametrize('shell', ['bash', 'zsh', 'fish'])
def test_completion(capsys, shell):
  code, out, err = run(capsys, 'completion', shell)
  assert (code, err) == (0, '')
  for words in (*main.COMMANDS, 'num_actors', 'nocheck', *configs.names(), 'scale'):
    assert words in out


def test_bash_completes(capsys, tmp_path):
  script = tmp_path / 'impala'
  script.write_text(run(capsys, 'completion', 'bash')[1])

  def complete(*words):
    """What the shell offers for the last of the words."""
    text = (
      f'source {script}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
      'COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; '
      '$(complete -p impala | sed "s/.*-F \\([^ ]*\\).*/\\1/"); '
      'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
      ['bash', '-c', text, 'bash', 'impala', *words],
      capture_output=True,
      text=True,
      timeout=60,
      cwd=tmp_path,
    )
    return done.stdout.split()

  assert complete('tr') == ['train']
  assert complete('manage', '') == ['status', 'logs', 'scale', 'stop']
  assert complete('train', '--transport', '') == ['reverb', 'tcp', 'local']
  assert complete('train', '--config', 'po') == ['pong']
  assert complete('dmlab30', '--lev') == ['--levels', '--level_cache']
  assert set(complete('train', '--nor')) == {'--noresume'}
