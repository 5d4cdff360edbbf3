"""What `--resume` does before anything starts: it judges first, and writes after."""

import concurrent.futures
import dataclasses
import json
import pathlib

import pytest

import impala_jax
from impala_jax import config as config_lib
from impala_jax import configs, settings
from impala_jax.commands import main
from impala_jax.launching import run_directory
from impala_jax.launching.backends import backend
from impala_jax.learning import checkpointing
from impala_jax.runtime import lease
from impala_jax.runtime.run_directory import RunDirectory


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
  """(exit code, stdout, stderr) of `impala train ...` in an empty folder."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path / 'user'))
  monkeypatch.setenv('XDG_CONFIG_DIRS', str(tmp_path / 'system'))
  for name in ('IMPALA_LAUNCHER', 'IMPALA_LAUNCHER_SET'):
    monkeypatch.delenv(name, raising=False)

  def run(*argv):
    code = main.main(['train', *argv])
    printed = capsys.readouterr()
    return code, printed.out, printed.err

  return run


@pytest.fixture
def slurm(tmp_path, monkeypatch):
  """Stand-ins for Slurm, which take any job and forget it; gives the jobs' scripts."""
  folder = tmp_path / 'bin'
  folder.mkdir()
  for name in ('sbatch', 'squeue', 'sacct', 'scontrol', 'scancel'):
    script = folder / name
    script.write_text(
      f'#!/bin/sh\necho "$@" >> {folder}/{name}.calls\n'
      + ('echo 7\n' if name == 'sbatch' else '')
    )
    script.chmod(0o755)
  monkeypatch.setenv('PATH', f'{folder}:/usr/bin:/bin')

  def jobs():
    calls = folder / 'sbatch.calls'
    return calls.read_text().splitlines() if calls.exists() else []

  return jobs


def make(*changes, updates=(105,), name='old'):
  """A run with checkpoints, by other settings than Catch's own."""
  config = config_lib.override(configs.get('catch'), ['transport.kind=local', *changes])
  run_dir = run_directory.create(config, name)
  for n in updates:
    save(run_dir, n, config)
  return run_dir


def save(run_dir, updates, config):
  metadata = {'updates': updates, 'frames': 144 * updates}
  metadata['config'] = config_lib.to_dict(config)
  return checkpointing.save(run_dir / 'checkpoints', updates, {}, metadata)


def everything(folder):
  """What is in a folder: any change shows."""
  return {
    p: (p.stat().st_mtime_ns, p.read_bytes())
    for p in pathlib.Path(folder).rglob('*')
    if p.is_file()
  }


RESUME = ('--resume', '--run_dir=old')


@pytest.mark.parametrize('more', [['--check'], [], ['--dry_run']])
def test_all_that_cannot_change_is_refused_at_once_and_nothing_is_written(run, more):
  make('network.hidden=24')
  before = everything('old')
  code, out, err = run(
    *RESUME,
    *more,
    '--set=network.hidden=32',
    '--set=network.lstm=16',
    '--set=optimizer.momentum=0.5',
    '--set=optimizer.learning_rate=1e-3',
  )
  assert (code, out) == (2, '')
  assert err.splitlines() == [
    'impala_jax: --resume: checkpoint_0000000105.msgpack was trained with other '
    'settings:',
    '  network.hidden was 24, would be 32: cannot change in a run that goes on',
    '  network.lstm was 0, would be 16: cannot change in a run that goes on',
    '  optimizer.momentum was 0.0, would be 0.5: cannot become 0, or cease to be, in a '
    'run that goes on',
  ]
  assert everything('old') == before


@pytest.mark.parametrize('suite', ['atari', 'doom'])
def test_another_game_is_another_run(run, suite):
  pytest.importorskip({'atari': 'ale_py', 'doom': 'vizdoom'}[suite])
  level, other = {
    'atari': ('breakout', 'pong'), 'doom': ('basic', 'my_way_home')
  }[suite]  # fmt: skip
  run_directory.create(
    config_lib.override(
      configs.get('small'),
      [
        'transport.kind=local',
        f'environment.suite={suite}',
        f'environment.levels={level}',
      ],
    ),
    'old',
  )
  _, config = run_directory.open_existing('old')
  save(pathlib.Path('old'), 5, config)
  before = everything('old')
  words = f'environment.levels was {level}, would be {other}: cannot change'
  for more in (['--check'], []):
    code, _, err = run(*RESUME, f'--game={other}', *more)
    assert code == 2
    assert words in err
  assert everything('old') == before


def test_what_may_change_changes(run, slurm):
  make()
  changes = [
    'learner.batch_size=64', 'actor.unroll_length=5', 'actor.num_actors=2',
    'optimizer.learning_rate=1e-3', 'optimizer.schedule=constant',
    'loss.discount=0.9', 'learner.total_frames=5e5', 'network.dtype=bfloat16',
  ]  # fmt: skip
  sets = [f'--set={c}' for c in changes]
  code, _, err = run(*RESUME, *sets, '--check')
  assert code == 0, err
  assert (
    'goes on from checkpoint_0000000105.msgpack: 105 updates, 15,120 of 500,' in err
  )
  assert run(*RESUME, *sets, '--launcher=slurm')[0] == 0
  _, config = run_directory.open_existing('old')
  assert config == config_lib.override(
    config_lib.override(configs.get('catch'), ['transport.kind=local']), changes
  )
  assert len(slurm()) == 1


def test_what_was_changed_by_mistake_is_changed_back(run, slurm):
  """By an earlier version, which wrote first and failed then."""
  run_dir = make()
  saved = json.loads((run_dir / 'config.json').read_text())
  saved['config']['network']['hidden'] = 7
  (run_dir / 'config.json').write_text(json.dumps(saved))
  code, _, err = run(*RESUME, '--launcher=slurm')
  assert code == 2
  assert 'network.hidden was 64, would be 7' in err
  assert slurm() == []
  code, _, err = run(*RESUME, '--launcher=slurm', '--set=network.hidden=64')
  assert code == 0, err


def test_a_refused_submission_leaves_the_run_to_others(run, slurm, tmp_path):
  make()
  script = tmp_path / 'bin' / 'sbatch'
  text = script.read_text()
  script.write_text('#!/bin/sh\necho no account >&2\nexit 1\n')
  code, _, err = run(*RESUME, '--launcher=slurm')
  assert code == 2
  assert 'no account' in err
  script.write_text(text)
  assert run(*RESUME, '--launcher=slurm')[0] == 0
  assert lease.newest(RunDirectory(pathlib.Path('old'))).launch == 1


def _damage(path):
  path.write_bytes(path.read_bytes()[:-1])


def test_a_run_without_a_sound_checkpoint_begins_anew_where_that_is_said(run, slurm):
  make(updates=(3, 9))
  paths = checkpointing.paths(pathlib.Path('old/checkpoints'))
  _damage(paths[1])
  code, _, err = run(*RESUME, '--check')
  assert code == 0
  assert 'not used: ' in err
  assert '9.msgpack is damaged' in err
  assert 'goes on from checkpoint_0000000003.msgpack' in err
  code, _, err = run(*RESUME, '--start_anew', '--launcher=slurm')
  assert code == 2
  assert '3.msgpack is sound: go on from it' in err

  _damage(paths[0])
  before = everything('old')
  for more in ((), ('--check',)):
    code, _, err = run(*RESUME, '--launcher=slurm', *more)
    assert code == 2
    assert 'no checkpoint in old/checkpoints is sound' in err
    assert '--resume --start_anew' in err
  assert everything('old') == before
  code, _, err = run(*RESUME, '--start_anew', '--launcher=slurm')
  assert code == 0, err
  assert 'there is no checkpoint: begins at 0' in err
  assert checkpointing.paths(pathlib.Path('old/checkpoints')) == []
  assert len(list(pathlib.Path('old/checkpoints').glob('*.damaged'))) == 2
  assert slurm()


def test_of_two_that_want_the_same_new_directory_one_makes_it(tmp_path):
  path = str(tmp_path / 'new')
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    asked = [
      pool.submit(run_directory.create, configs.get('catch'), path) for _ in range(24)
    ]
  failed = [a.exception() for a in asked if a.exception()]
  assert len(failed) == 23
  assert {str(e) for e in failed} == {
    f'--run_dir={path}: holds a run already; add --resume to go on with it'
  }
  (tmp_path / 'file').touch()
  with pytest.raises(run_directory.RunDirectoryError, match='file is no directory'):
    run_directory.create(configs.get('catch'), str(tmp_path / 'file'))


def test_a_run_that_never_saved_says_where_it_begins(run):
  make(updates=())
  code, _, err = run(*RESUME, '--check', '--set=network.hidden=9')
  assert (code, err) == (0, 'old: there is no checkpoint: begins at 0\n')


@pytest.mark.parametrize(
  ('argv', 'words'),
  [
    (['--resume'], '--resume needs --run_dir: the directory of the run'),
    (['--resume', '--run_dir='], '--run_dir is empty: name a directory'),
    (['--run_dir', ''], '--run_dir is empty: name a directory'),
    (['--resume', '--run_dir=none'], "--resume: no run in 'none'"),
    (['--start_anew', '--run_dir=new'], '--start_anew needs --resume'),
    (['--resume', '--run_dir=old', '--config=pong'], '--config=pong with --resume'),
  ],
)
def test_mistakes(run, argv, words):
  make()
  before = everything('.')
  code, out, err = run(*argv)
  assert (code, out, len(err.splitlines())) == (2, '', 1)
  assert words in err
  assert everything('.') == before


@pytest.mark.parametrize('owner', ['foreground', 'local', 'slurm', 'Python'])
@pytest.mark.parametrize('launcher', ['foreground', 'local', 'slurm', 'Python'])
def test_a_run_that_goes_on_is_not_begun_again(run, slurm, owner, launcher):
  """Whoever runs it, and whoever asks: here the owner is this process."""
  run_dir = make()
  directory = RunDirectory(run_dir)
  assert lease.make(directory, 0, owner)
  before = everything('old')
  if launcher == 'Python':
    with pytest.raises(backend.BackendError, match='already runs: ') as e:
      impala_jax.train(configs.get('catch'), run_dir=run_dir)
    err = str(e.value)
  else:
    code, _, err = run(*RESUME, f'--launcher={launcher}')
    assert code == 2
    assert len(err.splitlines()) == 1
  assert f'already runs: {run_dir.absolute()}, by {owner} since ' in err.replace(
    ' old,', f' {run_dir.absolute()},'
  )
  assert everything('old') == before
  assert slurm() == []
  # Looking is allowed.
  assert run(*RESUME, '--check')[0] == 0


def test_what_must_be_kept_is_said_by_the_fields():
  kept = {
    f'{section.name}.{field.name}'
    for section in dataclasses.fields(config_lib.Config)
    if dataclasses.is_dataclass(section.default)
    for field in dataclasses.fields(section.default)
    if field.metadata['setting'].kept
  }
  assert kept == {
    'environment.suite', 'environment.levels', 'network.torso', 'network.hidden',
    'network.lstm', 'network.frame_stack', 'network.last_action_reward',
    'network.instructions', 'optimizer.name', 'optimizer.momentum',
    'optimizer.max_grad_norm',
  }  # fmt: skip


@pytest.mark.parametrize('was', [{}, {'network': 7}, {'network': {'hidden': 'many'}}])
def test_settings_of_strange_files_are_compared_all_the_same(was):
  found = settings.changed(was, config_lib.Config())
  assert all('network.hidden was ' in text for text in found)
