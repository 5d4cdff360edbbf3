"""The batch scripts, without a Slurm: see integration/slurm_test.py for one."""

import re
import subprocess

import pytest

from impala_jax import config as config_lib
from impala_jax import configs
from impala_jax.launching import backends
from impala_jax.launching import program as program_lib
from impala_jax.launching.backends import backend
from tests.launching import programs


def options(script):
  """#SBATCH lines as a dictionary."""
  lines = re.findall(r'^#SBATCH --([a-z-]+)(?:=(.*))?$', script, re.MULTILINE)
  return dict(lines)


def render(program, *settings):
  return backends.get('slurm', settings).render(program)


def test_one_job_each_and_an_array():
  files = render(programs.make(actors=3))
  assert list(files) == ['learner.sbatch', 'actor-000000.sbatch', 'evaluator.sbatch']
  for script in files.values():
    found = options(script)
    assert 'requeue' in found
    assert found['chdir'] == '/shared/code'
    assert found['cpus-per-task']
    assert re.fullmatch(r'\d+M', found['mem'])
    # The shell must be replaced, or the signal would not reach the supervisor.
    last = script.splitlines()[-1]
    supervise = r'exec \S+ -m impala_jax.launching.supervise '
    assert re.match(supervise + '(learner|actor|evaluator) ', last)
    assert re.search(r'-- \S+ -m impala_jax.distributed.roles.run \w+$', last)
  assert options(files['actor-000000.sbatch'])['array'] == '0-2'
  assert 'array' not in options(files['learner.sbatch'])
  assert '--essential' in files['learner.sbatch']
  assert '--essential' not in files['actor-000000.sbatch']


def test_resources_are_what_was_asked_for():
  program = programs.make(
    learner=program_lib.Resources(cpus=12, memory_mib=65536, gpus=4),
    actor=program_lib.Resources(cpus=2, memory_mib=1500),
  )
  files = render(program)
  learner, actor = (
    options(files[f]) for f in ('learner.sbatch', 'actor-000000.sbatch')
  )
  assert (learner['cpus-per-task'], learner['mem']) == ('12', '65536M')
  assert learner['gres'] == 'gpu:4'
  assert (actor['cpus-per-task'], actor['mem']) == ('2', '1500M')
  assert 'gres' not in actor


@pytest.mark.parametrize(
  ('actors', 'size', 'arrays'),
  [
    (1001, 0, {0: '0-1000'}),
    (1002, 0, {0: '0-1000', 1001: '0-0'}),
    (2500, 1000, {0: '0-999', 1000: '0-999', 2000: '0-499'}),
  ],
)
def test_arrays_are_chunked(actors, size, arrays):
  files = render(programs.make(actors=actors), f'slurm.max_array_size={size}')
  found = {n: t for n, t in files.items() if n.startswith('actor-')}
  assert {int(n[6:12]): options(t)['array'] for n, t in found.items()} == arrays
  for name, script in found.items():
    assert f'--index={int(name[6:12])} --index_from=SLURM_ARRAY_TASK_ID' in script


def test_inference_servers():
  resources = {'inference': program_lib.Resources(cpus=6, memory_mib=9000, gpus=1)}
  one = render(programs.make(servers=1, **resources), 'slurm.inference_partition=gpu')
  script = one['inference.sbatch']
  found = options(script)
  assert (found['partition'], found['gres']) == ('gpu', 'gpu:1')
  assert (found['cpus-per-task'], found['mem']) == ('6', '9000M')
  # Actors on other hosts must find it.
  assert '--slurm_host' in script
  assert '--essential' not in script
  files = render(programs.make(servers=3), 'slurm.array_throttle=1')
  assert list(files) == [
    'learner.sbatch',
    'inference-000000.sbatch',
    'actor-000000.sbatch',
    'evaluator.sbatch',
  ]
  found = options(files['inference-000000.sbatch'])
  assert found['array'] == '0-2'  # All at once.
  assert 'partition' not in found


def test_options_of_the_cluster():
  files = render(
    programs.make(),
    'slurm.partition=cpu',
    'slurm.learner_partition=gpu',
    'slurm.account=lab',
    'slurm.time_limit=2-00:00:00',
    'slurm.array_throttle=2',
    'slurm.setup=source /shared/venv/bin/activate',
    'slurm.extra=--reservation=maintenance',
    'slurm.python=/shared/venv/bin/python',
  )
  learner, actor = (
    options(files[f]) for f in ('learner.sbatch', 'actor-000000.sbatch')
  )
  assert (learner['partition'], actor['partition']) == ('gpu', 'cpu')
  assert actor['account'] == 'lab'
  assert actor['time'] == '2-00:00:00'
  assert actor['array'] == '0-2%2'
  assert actor['reservation'] == 'maintenance'
  lines = files['learner.sbatch'].splitlines()
  assert lines[-2] == "eval 'source /shared/venv/bin/activate'"
  python = '/shared/venv/bin/python'
  assert lines[-1].startswith(f'exec {python} -m impala_jax.launching.supervise')


def test_the_signal_leaves_time_for_the_checkpoint():
  program = programs.make()
  found = options(render(program)['learner.sbatch'])
  seconds = int(found['signal'].removeprefix('B:USR1@'))
  assert seconds > program.role('learner').grace


def test_a_gang_runs_under_srun_with_a_supervisor_above():
  script = render(programs.make(learners=4))['learner.sbatch']
  found = options(script)
  assert (found['nodes'], found['ntasks'], found['ntasks-per-node']) == ('4', '4', '1')
  outer, srun, inner = re.split(r' -- ', script.splitlines()[-1])
  assert ' learner-gang ' in outer
  assert '--essential' in outer
  assert srun.startswith('srun --ntasks=4 ')
  assert '--kill-on-bad-exit=1' in srun
  assert '--index_from=SLURM_PROCID --once' in srun
  assert '--essential' not in srun
  assert inner.endswith('roles.run learner')
  assert 'export IMPALA_COUNT=4' in script


def test_paths_are_quoted_and_scripts_are_sound_shell():
  for script in render(programs.make(run_dir="/shared/it's a run")).values():
    subprocess.run(['bash', '-n'], input=script, text=True, check=True, timeout=30)
    assert '--output="/shared/it\'s a run/logs/' in script
    assert "IMPALA_RUN_DIR='/shared/it'\"'\"'s a run'" in script


def test_commands_submit_what_is_rendered():
  slurm = backends.get('slurm')
  program = programs.make()
  names = [c[-1].rpartition('/')[2] for c in slurm.commands(program)]
  assert names == list(slurm.render(program))
  assert all(c[:2] == ['sbatch', '--parsable'] for c in slurm.commands(program))


def test_the_dry_run_shows_all_files_and_commands(tmp_path):
  slurm = backends.get('slurm', ['slurm.actor_cpus=3', 'slurm.learner_grace=77'])
  config = config_lib.override(configs.get('catch'), ['transport.kind=reverb'])
  program = slurm.program(config, tmp_path / 'run')
  assert program.role('learner').grace == 77
  assert program.role('actor').resources.cpus == 3
  text = slurm.describe(program)
  for name, script in slurm.render(program).items():
    assert f'# --- {name} ---\n{script}' in text
    assert f'sbatch --parsable {tmp_path}/run/launch/{name}' in text
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('settings', 'words'),
  [
    (['slurm.partion=x'], 'did you mean slurm.partition'),
    (['slurm.actor_cpus=0', 'slurm.learner_gpus=-1'], 'slurm.learner_gpus is -1'),
    (['slurm.actor_cpus=0'], 'slurm.actor_cpus is 0: must be at least 1'),
    (['slurm.actor_memory_gib=nan'], 'slurm.actor_memory_gib is nan'),
    (['kubernetes.image=x'], 'has no effect with the launcher slurm'),
    (['slurm.max_array_size=-1'], 'must not be negative'),
  ],
)
def test_mistakes_in_options(settings, words):
  with pytest.raises(config_lib.ConfigError, match=re.escape(words)):
    backends.get('slurm', settings)


def test_an_unknown_launcher():
  with pytest.raises(config_lib.ConfigError, match='local, slurm, kubernetes'):
    backends.get('slrum')


def test_without_slurm_one_clear_error(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  program = programs.make(run_dir=str(tmp_path / 'run'))
  with pytest.raises(backend.BackendError, match=r'not on PATH here.*--dry_run'):
    backends.get('slurm').submit(program)
  assert not (tmp_path / 'run' / 'launch.json').exists()
