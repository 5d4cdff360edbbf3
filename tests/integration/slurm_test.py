"""A whole run on a real Slurm: submitted, hurt in every way, scaled, stopped."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

from impala_jax import config as config_lib
from impala_jax import configs
from impala_jax.commands import manage
from impala_jax.launching import backends, run_directory, run_name
from impala_jax.launching.backends import backend, ownership
from impala_jax.learning import checkpointing
from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory
from tests import transports
from tests.integration import slurm_cluster
from tests.launching import programs

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = [
  pytest.mark.services,
  pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing()),
  pytest.mark.timeout(1500),
]
# One learner fills a node, two actors do not fit on one.
SETTINGS = [
  'slurm.learner_cpus=8', 'slurm.learner_memory_gib=3', 'slurm.learner_grace=30',
  'slurm.actor_cpus=5', 'slurm.actor_memory_gib=1.5',
  'slurm.evaluator_cpus=3', 'slurm.evaluator_memory_gib=1.5',
]  # fmt: skip


@pytest.fixture
def cluster(tmp_path, monkeypatch):
  folder = tmp_path / 'slurm'
  folder.mkdir()
  cluster = slurm_cluster.Cluster(folder, nodes=5, cpus=8, max_array=2)
  monkeypatch.setenv('SLURM_CONF', cluster.environment['SLURM_CONF'])
  monkeypatch.delenv('XLA_FLAGS')  # Of the tests: four devices.
  yield cluster
  cluster.close()


class Run:
  """A submitted run and what there is to know about it."""

  def __init__(self, run_dir: pathlib.Path):
    self.run_dir = run_dir

  def manage(self, command: str, *arguments: str) -> str:
    done = subprocess.run(
      [sys.executable, '-m', 'launch.manage', command, str(self.run_dir), *arguments],
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=300,
      check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  def report(self):
    return manage.status(self.run_dir)

  def tasks(self, role: str, state: str = 'running'):
    return [
      t for t in self.report()['tasks'] if t['role'] == role and t['state'] == state
    ]

  def updates(self) -> int:
    return self.report()['training'].get('updates', 0)

  def actors_heard(self, seconds: float = 10.0) -> set[int]:
    """Indices of the actors that the learner has heard of lately."""
    training = self.report()['training']
    if training.get('age', 1e9) > seconds:
      return set()
    peers = [p for p in training['peers'] if p['silent_seconds'] < seconds]
    return {p['index'] for p in peers if p['role'] == 'actor'}

  def wait(self, condition, what: str, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
      if condition():
        return
      time.sleep(0.5)
    logs = {
      p.name: p.read_text(errors='replace')[-1500:]
      for p in (self.run_dir / 'logs').iterdir()
    }
    words = '\n'.join(f'--- {k}\n{v}' for k, v in logs.items())
    raise AssertionError(
      f'not within {seconds:.0f} s: {what}\n{manage.describe(self.report())}\n{words}'
    )

  def wait_for_training(self, what: str, more: int = 20) -> None:
    """Until the present learner has made `more` updates since now."""
    before = self.updates()
    self.wait(lambda: self.updates() >= before + more, f'training {what}')


def _submit(tmp_path: pathlib.Path) -> Run:
  config = config_lib.override(
    configs.get('catch'),
    [
      'actor.num_actors=3',
      'learner.total_frames=1e9',
      'evaluator.interval=5',
      'learner.checkpoint_interval=1',
      f'transport.kind={transports.BETWEEN_PROCESSES}',
    ],
  )
  run_dir = run_directory.create(config, str(tmp_path / 'run'))
  launch = ownership.claim(RunDirectory(run_dir), 'slurm', None)
  run_directory.begin(run_dir, config, launch)
  slurm = backends.get('slurm', SETTINGS)
  program = slurm.program(config, run_dir, launch)
  slurm.submit(program)
  return Run(run_dir)


def _process(role: str, index: int) -> psutil.Process:
  """The process of a role on this machine's cluster."""
  for process in psutil.process_iter():
    try:
      environment = process.environ()
      if (
        process.cmdline()[-2:] == ['impala_jax.distributed.roles.run', role]
        and 'impala_jax.launching.supervise' not in process.cmdline()
        and environment.get('IMPALA_INDEX') == str(index)
        and environment.get('SLURM_CONF') == os.environ['SLURM_CONF']
      ):
        return process
    except psutil.Error:
      continue
  raise AssertionError(f'no process of {role} {index}')


def test_a_run_survives_what_clusters_do(cluster, tmp_path):
  run = _submit(tmp_path)
  launch = json.loads((run.run_dir / 'launch.json').read_text())
  # Two arrays: Slurm was asked how long one may be.
  assert [c['count'] for c in launch['handles']['actor']] == [2, 1]
  run.wait_for_training('begins')
  run.wait(lambda: run.actors_heard() == {0, 1, 2}, 'all actors work')
  with pytest.raises(backend.BackendError, match=r'already runs: .*, by slurm since'):
    ownership.last_owner(RunDirectory(run.run_dir))
  nodes = {t['where'] for t in run.tasks('actor')}
  assert len(nodes) == 3
  assert {t['where'] for t in run.tasks('learner')}.isdisjoint(nodes)

  # An actor's process is killed: its supervisor starts another.
  _process('actor', 0).send_signal(signal.SIGKILL)
  run.wait(lambda: run.tasks('actor')[0]['restarts'] == 1, 'a new actor process')
  run.wait(lambda: run.actors_heard(4) == {0, 1, 2}, 'the new actor works')
  run.wait_for_training('after the loss of an actor process')

  # An actor's node is lost: Slurm starts the actor on another.
  lost = next(t for t in run.tasks('actor') if t['index'] == 1)
  cluster.lose_node(lost['where'])
  run.wait_for_training('while a node is lost')
  run.wait(
    lambda: any(
      t['index'] == 1 and t['where'] != lost['where'] for t in run.tasks('actor')
    ),
    'the actor on another node',
  )
  run.wait(lambda: run.actors_heard(4) == {0, 1, 2}, 'the moved actor works')
  actor = next(t for t in run.tasks('actor') if t['index'] == 1)
  assert actor['incarnation'] > lost['incarnation']
  cluster.start_node(lost['where'])

  # The learner's node is lost: it goes on elsewhere from its last checkpoint.
  where = run.tasks('learner')[0]['where']
  saved = checkpointing.paths(run.run_dir / 'checkpoints')[-1]
  at_least = checkpointing.read(saved)['metadata']['updates']
  starts = lambda: [t['incarnation'] for t in run.tasks('actor')]
  before = starts()
  cluster.lose_node(where)
  lost_at = time.time()
  run.wait(
    lambda: (
      run.tasks('learner')
      and run.tasks('learner')[0]['where'] != where
      and run.report()['training'].get('time', 0) > lost_at + 5
    ),
    'the learner on another node',
  )
  run.wait_for_training('on another node')
  log = (run.run_dir / 'logs' / 'learner.log').read_text()
  resumed = int(log.rpartition('goes on from')[2].split('checkpoint_')[1][:10])
  assert resumed >= at_least
  records = [
    json.loads(x) for x in (run.run_dir / 'metrics.jsonl').read_text().splitlines()
  ]
  after = [r['updates'] for r in records if r['time'] > lost_at + 5]
  assert after[0] >= resumed
  assert records[-1]['unrolls_duplicated'] == records[-1]['unrolls_corrupted'] == 0
  run.wait(lambda: run.actors_heard(4) == {0, 1, 2}, 'all actors found it')
  assert starts() == before  # The same processes, with their environments.

  # Fewer, and more.
  run.manage('scale', 'actors', '1')
  run.wait(lambda: run.actors_heard(4) == {0}, 'one actor alone')
  run.wait_for_training('with one actor', 5)
  assert 'actor: 1 -> 2' in run.manage('scale', 'actors', '2')
  run.wait(lambda: run.actors_heard(4) == {0, 1}, 'two actors')
  text = run.manage('status')
  assert 'frames/s' in text
  assert 'updates' in run.manage('logs', 'learner', '--lines=200') or text

  # Stopped: a checkpoint of the last update, and nothing left.
  assert run.manage('stop').startswith('stopped')
  last = json.loads((run.run_dir / 'metrics.jsonl').read_text().splitlines()[-1])
  final = checkpointing.read(checkpointing.paths(run.run_dir / 'checkpoints')[-1])
  assert final['metadata']['updates'] == last['updates'] > resumed
  assert cluster.running() == []
  report = run.report()
  assert {t['state'] for t in report['tasks']} == {'done'}
  assert report['ended']['reason'] == 'stopped'
  # The next launch may have the directory, and its records go on.
  assert ownership.last_owner(RunDirectory(run.run_dir)).launch == 0
  lines = files.read_json_lines(run.run_dir / 'metrics.jsonl')
  for name in ('frames', 'wall_seconds', 'updates'):
    assert [r[name] for r in lines] == sorted(r[name] for r in lines)


def _submit_stand_ins(tmp_path: pathlib.Path, learners: int = 1, **scripts) -> Run:
  # All that sbatch and shells look at.
  run_dir = tmp_path / 'it\'s a $RUN, 50 %j "#1" & 实验'
  run_dir.mkdir()
  slurm = backends.get('slurm', [*SETTINGS, 'slurm.extra=--comment=\'say "50 %"\''])
  program = programs.make(
    str(run_dir), 2, learners, name=run_name.ensure(run_dir), **slurm.options.resources
  )
  slurm.submit(programs.with_stand_ins(program, scripts=scripts))
  return Run(run_dir)


def test_a_job_near_its_time_limit_goes_on_in_another(cluster, tmp_path):
  run = _submit_stand_ins(tmp_path)
  started = lambda name: programs.starts(run.run_dir, name)
  run.wait(lambda: started('learner-0') and started('actor-1'), 'begins')
  handles = json.loads((run.run_dir / 'launch.json').read_text())['handles']
  # What Slurm sends by --signal, without waiting for a limit of minutes.
  task = f'{handles["actor"][0]["job"]}_1'
  for job in (handles['learner'], task):
    cluster.command('scancel', '--batch', '--signal=USR1', job)
  run.wait(
    lambda: len(started('learner-0')) == len(started('actor-1')) == 2,
    'both again',
  )
  assert (run.run_dir / 'learner-0.told').exists()
  assert started('actor-1')[1][0] > started('actor-1')[0][0]
  # The other task of the array is left alone, then and later.
  time.sleep(15.0)
  assert len(started('actor-0')) == 1
  assert not (run.run_dir / 'ended.json').exists()
  (run.run_dir / 'evaluator-0.finish').touch()
  assert run.manage('stop').startswith('stopped')
  assert cluster.running() == []


def test_a_gang_of_learners_restarts_and_stops_as_a_unit(cluster, tmp_path):
  run = _submit_stand_ins(tmp_path, learners=2)
  started = lambda index: programs.starts(run.run_dir, f'learner-{index}')
  run.wait(lambda: started(0) and started(1), 'begins')
  os.kill(started(1)[0][1], signal.SIGKILL)
  run.wait(lambda: len(started(0)) == len(started(1)) == 2, 'both again')
  assert not psutil.pid_exists(started(0)[0][1])
  assert not (run.run_dir / 'ended.json').exists()
  (run.run_dir / 'evaluator-0.finish').touch()
  for index in (0, 1):
    (run.run_dir / f'learner-{index}.told').unlink(missing_ok=True)
  assert run.manage('stop').startswith('stopped')
  for index in (0, 1):
    assert (run.run_dir / f'learner-{index}.told').exists()
  assert cluster.running() == []


def test_a_crash_loop_ends_the_run_with_its_cause(cluster, tmp_path):
  run = _submit_stand_ins(tmp_path, learner=programs.CRASH)
  run.wait(lambda: (run.run_dir / 'ended.json').exists(), 'given up')
  launch = json.loads((run.run_dir / 'launch.json').read_text())
  name, job = launch['program']['name'], launch['handles']['learner']
  assert (run.run_dir / 'logs' / f'slurm-{name}-learner-{job}.out').exists()
  assert 'Comment=say "50 %"' in cluster.command('scontrol', 'show', 'job', job)
  (run.run_dir / 'evaluator-0.finish').touch()
  run.wait(lambda: not cluster.running(), 'all have left')
  assert [t['index'] for t in run.tasks('learner', 'failed')] == [0]
  assert 'ValueError: no such game' in run.manage('status')
