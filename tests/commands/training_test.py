"""What `train` and `dmlab30` do before anything starts."""

import importlib.util
import json

import pytest

from impala_jax import config as config_lib
from impala_jax import configs
from impala_jax.commands import main
from impala_jax.launching import run_directory


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
  """An empty folder, and a site that has chosen nothing."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path / 'user'))
  monkeypatch.setenv('XDG_CONFIG_DIRS', str(tmp_path / 'system'))
  for name in ('IMPALA_LAUNCHER', 'IMPALA_LAUNCHER_SET'):
    monkeypatch.delenv(name, raising=False)
  return tmp_path


@pytest.fixture
def run(capsys):
  """(exit code, stdout, stderr) of `impala ...` in this process."""

  def run(*argv):
    code = main.main(argv)
    printed = capsys.readouterr()
    return code, printed.out, printed.err

  return run


def checked(run, *argv):
  """The configuration that `--check` prints."""
  code, out, err = run(*argv, '--transport=local', '--check')
  assert code == 0, err
  data, _ = json.JSONDecoder().raw_decode(out[out.index('{') :])
  return config_lib.from_dict(data)


def test_flags_are_settings(run):
  config = checked(
    run,
    'train',
    '--config=catch',
    '--seed=5',
    '--total_frames',
    '2e6',
    '--num_actors=3',
    '--set=loss.discount=0.9',
    '--set',
    'seed=6',
  )
  assert (config.actor.num_actors, config.learner.total_frames) == (3, 2_000_000)
  assert config.loss.discount == 0.9
  assert config.seed == 6  # `--set` wins.


def test_flags_of_dmlab30(run):
  doom = ['dmlab30', '--suite=doom', '--levels=basic,my_way_home', '--network=deep']
  config = checked(run, *doom)
  assert config.name == 'doom'
  assert config.environment.levels == ('basic', 'my_way_home')
  assert config.network.torso == 'deep'
  code, _, err = run(*doom, '--check', '--noskip_unavailable_levels')
  assert code == 2
  assert 'dmlab.skip_unavailable_levels has no effect: environment.suite is' in err


def test_a_file_of_settings(run, place):
  (place / 'my.json').write_text(
    json.dumps({'config': config_lib.to_dict(configs.get('catch'))})
  )
  config = checked(run, 'train', '--config=my.json', '--seed=9')
  assert config.network == configs.get('catch').network
  assert config.seed == 9
  code, _, err = run('train', '--config=yours.json')
  assert (code, err) == (
    2,
    'impala_jax: --config=yours.json: No such file or directory\n',
  )


def test_a_run_goes_on_with_its_own_configuration(run, place):
  run_directory.create(configs.get('catch'), 'old')
  resume = ('train', '--resume', '--run_dir=old')
  assert checked(run, *resume).name == 'catch'
  assert checked(run, *resume, '--config=catch').name == 'catch'
  for other in ('pong', 'my.json'):
    code, _, err = run(*resume, f'--config={other}')
    assert code == 2
    assert f"--config={other} with --resume: the run has the settings of 'catch'" in err


def test_a_thousand_actors_are_refused_before_anything_starts(run, place):
  argv = ('dmlab30', '--suite=doom', '--num_actors', '1000', '--run_dir=new')
  code, _, err = run(*argv)
  assert code == 2
  assert '1,000 actors are more than this machine holds' in err
  for words in ('processes', 'GiB', 'cores', '--launcher=slurm --dry_run'):
    assert words in err
  assert 'Traceback' not in err
  assert not (place / 'new').exists()
  # It is said beside all else that is wrong, and not where the user insists.
  wrong = '--set=learner.batch_size=0'
  assert 'more than this machine' in run(*argv, wrong)[2]
  assert 'more than this machine' not in run(*argv, wrong, '--oversubscribe')[2]
  assert 'learner.batch_size is 0' in run(*argv, wrong)[2]


def test_detached_processes_are_on_this_machine_too(run):
  argv = ('train', '--config=catch', '--num_actors=1000', '--dry_run')
  assert 'more than this machine' in run(*argv, '--launcher=local')[2]
  code, out, err = run(*argv, '--launcher=slurm')
  assert code == 0, err
  assert 'sbatch --parsable' in out


def test_a_dry_run_shows_what_would_start_here(run, place):
  code, out, err = run('train', '--config=catch', '--transport=local', '--dry_run')
  assert (code, err) == (0, '')
  assert '-m impala_jax.distributed.roles.run all' in out
  assert not (place / 'runs').exists()


def test_the_launcher_of_the_site(run, monkeypatch, place):
  file = place / 'user' / 'impala_jax' / 'launcher.toml'
  file.parent.mkdir(parents=True)
  file.write_text('launcher = "slurm"\n[slurm]\npartition = "mine"\n')
  argv = ('train', '--config=catch', '--num_actors=1000', '--dry_run')
  code, out, err = run(*argv)
  assert code == 0, err
  assert '#SBATCH --partition=mine' in out
  assert f'launcher slurm: by {file}; --launcher=foreground' in err
  out = run(*argv, '--launcher_set', 'slurm.partition=yours')[1]
  assert '#SBATCH --partition=yours' in out
  code, _, err = run(*argv[:-1], '--launcher=foreground')
  assert code == 2
  assert 'more than this machine' in err
  file.write_text('launcher = "slrum"\n')
  code, _, err = run(*argv)
  assert code == 2
  assert f"{file}: launcher is 'slrum'" in err


def test_other_machines_need_the_suite_not_this_one(run, monkeypatch):
  real = importlib.util.find_spec
  gone = ('vizdoom', 'ale_py')
  lack = lambda name, *args: None if name in gone else real(name, *args)
  monkeypatch.setattr(importlib.util, 'find_spec', lack)
  for argv in (('dmlab30', '--suite=doom'), ('train',)):
    code, _, err = run(*argv, '--launcher=slurm', '--dry_run')
    assert code == 0, err
    assert 'is not installed here: the machines of the run need it' in err
    code, _, err = run(*argv)
    assert code == 2
    assert 'pip install' in err


@pytest.mark.parametrize(
  ('argv', 'words'),
  [
    (['--launcher_set=slurm.qos=x'], 'has no effect with the launcher foreground'),
    (['--launcher=foreground', '--launcher_set=local.python=x'], 'has no effect'),
    (['--launcher=slrum'], '--launcher=slrum: must be one of foreground, local, slurm'),
    (['--launcher=slurm', '--launcher_set=slurm.partion=x'], 'slurm.partition'),
    (['--transport=udp'], '--transport=udp: must be one of reverb, tcp, local'),
  ],
)
def test_mistakes(run, place, argv, words):
  code, _, err = run('train', '--config=catch', '--run_dir=new', *argv)
  assert code == 2
  assert words in err
  assert not (place / 'new').exists()
