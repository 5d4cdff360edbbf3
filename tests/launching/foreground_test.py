"""A run in the foreground, of stand-in roles: how it goes, ends, and what it says."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from impala_jax.launching import backends
from impala_jax.launching import program as program_lib
from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory
from tests.launching import programs

# Runs a program as a launcher does: prints phases, then what failed, and the exit code.
LAUNCHER = """
import json, pathlib, sys
from impala_jax.launching import backends
from impala_jax.launching import program as program_lib

phases = []

def show(status, phase):
  if phases[-1:] != [phase]:
    phases.append(phase)
    pathlib.Path(sys.argv[2]).write_text(json.dumps(phases))
    print('phase:', phase, flush=True)

program = program_lib.from_dict(json.loads(pathlib.Path(sys.argv[1]).read_text()))
code, lines = backends.get('foreground').run(program, show)
print('\\n'.join(lines))
sys.exit(code)
"""


@pytest.fixture
def launch(tmp_path):
  """Starts a run of stand-ins; whatever is left at the end is killed."""
  run_dir, started = tmp_path / 'run', []

  def start(actors=1, max_restarts=1, grace=5.0, **scripts):
    program = programs.make(str(run_dir), actors=actors)
    program = programs.with_stand_ins(program, max_restarts, scripts)
    roles = tuple(dataclasses.replace(role, grace=grace) for role in program.roles)
    program = dataclasses.replace(program, roles=roles)
    path = tmp_path / 'program.json'
    files.write_json(path, program_lib.to_dict(program))
    started.append(
      subprocess.Popen(
        [sys.executable, '-c', LAUNCHER, str(path), str(tmp_path / 'phases')],
        cwd=programs.ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
      )
    )
    return RunDirectory(run_dir), started[-1]

  yield start
  for process in started:
    if process.poll() is None:
      for child in (*psutil.Process(process.pid).children(recursive=True), process):
        child.kill()
    process.communicate()


def starts(run, name):
  return programs.starts(run.path, name)


def all_up(run):
  names = ('learner-0', 'actor-0', 'evaluator-0')
  programs.wait(lambda: all(starts(run, name) for name in names))


def finish(process):
  output, _ = process.communicate(timeout=60)
  return process.returncode, output


def test_a_learner_that_died_comes_back_and_the_end_is_the_learners(launch):
  run, process = launch()
  all_up(run)
  os.kill(starts(run, 'learner-0')[0][1], signal.SIGKILL)
  programs.wait(lambda: len(starts(run, 'learner-0')) == 2)
  phases = run.path.parent / 'phases'
  programs.wait(lambda: 'learner restarted 1x' in phases.read_text())
  # Told by nobody, as the learner stands in: the supervisors see to it.
  (run.path / 'evaluator-0.finish').touch()
  (run.path / 'learner-0.finish').touch()
  code, output = finish(process)
  assert code == 0, output
  assert run.how_ended()['reason'] == 'finished'
  assert (run.path / 'actor-0.told').exists()


def test_one_that_keeps_dying_ends_the_run_with_its_cause(launch):
  run, process = launch(learner=programs.CRASH)
  code, output = finish(process)
  assert code == 1
  assert 'learner ended with exit code 3: ValueError: no such game (2 deaths)' in output
  # Nobody waits for the last evaluation.
  assert (run.path / 'evaluator-0.told').exists()


def test_a_mistake_is_not_tried_again(launch):
  script = "print('CAUSE: ConfigError: no such game'); raise SystemExit(78)"
  run, process = launch(learner=script, max_restarts=5)
  code, output = finish(process)
  assert code == 1
  assert 'learner cannot work as it is configured: ConfigError: no such game' in output
  assert 'deaths' not in output
  assert files.read_json(run.supervised('learner', 0))['restarts'] == 0


def test_the_run_outlives_an_actor_that_failed_and_says_so(launch):
  second = "import os\nif os.environ['IMPALA_INDEX'] == '1':\n  "
  script = second + programs.CRASH + '\n' + programs.WORK
  run, process = launch(actors=2, max_restarts=0, actor=script)
  all_up(run)
  phases = run.path.parent / 'phases'
  programs.wait(lambda: 'actor-1 failed for good' in phases.read_text())
  for name in ('evaluator-0', 'learner-0'):
    (run.path / f'{name}.finish').touch()
  code, output = finish(process)
  assert code == 1
  assert run.how_ended()['reason'] == 'finished'
  assert 'phase: actor-1 failed for good' in output
  assert 'actor-1 ended with exit code 3: ValueError: no such game' in output


def test_an_interrupt_ends_the_learner_first_and_a_second_skips_the_evaluation(launch):
  run, process = launch()
  all_up(run)
  process.send_signal(signal.SIGINT)
  programs.wait(lambda: (run.path / 'learner-0.told').exists())
  programs.wait(lambda: (run.path / 'actor-0.told').exists())
  assert not (run.path / 'evaluator-0.told').exists()
  process.send_signal(signal.SIGINT)
  code, output = finish(process)
  assert code == 0, output
  assert (run.path / 'evaluator-0.told').exists()
  assert run.how_ended()['reason'] == 'stopped'
  assert 'phase: last evaluation and video' in output


def test_sigterm_waits_for_nothing_but_the_checkpoint(launch):
  run, process = launch()
  all_up(run)
  process.send_signal(signal.SIGTERM)
  code, output = finish(process)
  assert code == 0, output
  for name in ('learner-0', 'actor-0', 'evaluator-0'):
    assert (run.path / f'{name}.told').exists()


def test_manage_knows_a_run_in_the_foreground(launch):
  run, process = launch(actors=2)
  all_up(run)
  programs.wait(lambda: starts(run, 'actor-1'))
  noted = backends.backend.read_launch(run.path)
  engine = backends.of_launch(noted)
  assert {(t.role, t.index): t.state for t in engine.status(noted)} == {
    ('learner', 0): 'running',
    ('actor', 0): 'running',
    ('actor', 1): 'running',
    ('evaluator', 0): 'running',
  }
  with pytest.raises(backends.backend.BackendError, match='fixed number of actors'):
    engine.scale(noted, 'actor', 3)
  (run.path / 'evaluator-0.finish').touch()
  assert engine.stop(noted) == 'stopped'
  assert finish(process)[0] == 0
  assert {t.state for t in engine.status(noted)} == {'done'}
  assert engine.stop(noted) == 'had ended before'


def phases(run):
  path = run.path.parent / 'phases'
  return path.read_text() if path.exists() else ''


@pytest.mark.parametrize('name', ['actor-0', 'learner-0'])
def test_one_that_is_stopped_is_named_and_ends_in_order(launch, name):
  run, process = launch()
  all_up(run)
  os.kill(starts(run, name)[0][1], signal.SIGSTOP)
  shown = name.removesuffix('-0') if name.startswith('learner') else name
  programs.wait(lambda: f'{shown} is stopped by a signal' in phases(run))
  noted = backends.backend.read_launch(run.path)
  told = [t for t in backends.of_launch(noted).status(noted) if 'stopped' in t.detail]
  assert [f'{t.role}-{t.index}' for t in told] == [name]
  (run.path / 'evaluator-0.finish').touch()
  process.send_signal(signal.SIGINT)
  code, output = finish(process)
  assert code == 0, output  # Nothing had to be killed.
  assert (run.path / f'{name}.told').exists()


def test_a_third_interrupt_kills_what_does_not_end(launch):
  deaf = programs.WORK.replace('signal.SIGTERM, end', 'signal.SIGTERM, signal.SIG_IGN')
  run, process = launch(learner=deaf, grace=1000.0)
  all_up(run)
  process.send_signal(signal.SIGINT)
  programs.wait(lambda: 'stopping: the learner' in phases(run))
  pid = starts(run, 'learner-0')[0][1]
  while psutil.pid_exists(pid):  # Signals that come at once are one.
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
  code, output = finish(process)
  assert run.how_ended()['reason'] == 'stopped'
  assert code == 0, output


def test_a_process_that_nobody_can_look_after_ends_the_run(launch):
  """As on a full disk: what the supervisor notes cannot be written."""
  run, process = launch()
  all_up(run)
  record = run.supervised('actor', 0)
  record.unlink()
  record.mkdir()
  pids = [starts(run, f'{name}-0')[0][1] for name in ('learner', 'actor', 'evaluator')]
  os.kill(pids[1], signal.SIGKILL)
  code, output = finish(process)
  assert code == 1
  assert f'actor-0 could not be looked after: {record}' in output
  assert run.how_ended()['reason'] == 'failed'
  assert 'Traceback' not in output
  assert not any(psutil.pid_exists(pid) for pid in pids)


def test_the_end_needs_no_disk(launch):
  """Nothing can be written in the run's directory any more."""
  run, process = launch()
  all_up(run)
  for path in (run.ended, run.supervised('actor', 0)):
    path.unlink(missing_ok=True)
    path.mkdir()
  os.kill(starts(run, 'actor-0')[0][1], signal.SIGKILL)
  code, output = finish(process)
  assert code == 1
  assert 'actor-0 could not be looked after' in output
  assert (run.path / 'learner-0.told').exists()


def test_what_is_done_before_the_first_word(launch):
  begins = lambda words: f"print('STAGE: {words}', flush=True)\n{programs.WORK}"
  run, process = launch(
    learner=begins('importing'), actor=begins('starting 8 environments')
  )
  all_up(run)
  programs.wait(
    lambda: 'learner: importing, actor-0: starting 8 environments' in phases(run)
  )
  # Once there is a word, it is no more asked for.
  files.write_json(run.status, {'time': time.time() + 60, 'bottleneck': 'none'})
  programs.wait(lambda: phases(run).endswith('"running"]'))
  files.write_json(run.status, {'time': time.time() - 40, 'bottleneck': 'none'})
  programs.wait(lambda: 'nothing heard of the learner for ' in phases(run))
  for name in ('evaluator-0', 'learner-0'):
    (run.path / f'{name}.finish').touch()
  assert finish(process)[0] == 0
