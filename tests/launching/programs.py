"""Programs for the tests of the backends, and roles that stand in for real ones."""

import dataclasses
import pathlib
import time

from impala_jax import config as config_lib
from impala_jax import configs
from impala_jax.launching import program as program_lib

ROOT = pathlib.Path(__file__).parents[2]
# A role that notes its start, runs until it is told to end, and says so.
WORK = """
import json, os, pathlib, signal, sys, time
run_dir = pathlib.Path(os.environ['IMPALA_RUN_DIR'])
name = sys.argv[1] + '-' + os.environ['IMPALA_INDEX']
def end(*_):
  (run_dir / f'{name}.told').touch()
  sys.exit(143)  # As `roles.run` does.
signal.signal(signal.SIGTERM, end)
with open(run_dir / f'{name}.starts', 'a') as f:
  f.write(os.environ['IMPALA_INCARNATION'] + ' ' + str(os.getpid()) + '\\n')
print('hello from', name, flush=True)
while not (run_dir / f'{name}.finish').exists():
  time.sleep(0.05)
"""
CRASH = "print('CAUSE: ValueError: no such game'); raise SystemExit(3)"


def make(
  run_dir='/shared/runs/catch-1',
  actors=3,
  learners=1,
  launches=0,
  servers=0,
  name='',
  **resources,
):
  name = name or f'impala-{pathlib.Path(run_dir).name}'
  config = config_lib.override(
    configs.get('catch'),
    [
      f'actor.num_actors={actors}',
      'transport.kind=reverb',
      'learner.batch_size=32',
      f'inference.servers={servers}',
    ],
  )
  return program_lib.program_of(
    config, run_dir, '/shared/code', name, launches, learners, resources
  )


def with_stand_ins(program, max_restarts=3, scripts=()):
  """The same with `WORK`, or the scripts given by role, for commands."""
  scripts = dict(scripts)
  roles = tuple(
    dataclasses.replace(
      role,
      argv=('-c', scripts.get(role.name, WORK), role.name),
      grace=5.0,
      restart=dataclasses.replace(role.restart, max_restarts=max_restarts),
    )
    for role in program.roles
  )
  return dataclasses.replace(program, roles=roles, work_dir=str(ROOT))


def starts(run_dir, name):
  """(incarnation, process id) of each start of one stand-in, such as actor-0."""
  path = run_dir / f'{name}.starts'
  lines = path.read_text().splitlines() if path.exists() else []
  return [tuple(map(int, line.split())) for line in lines]


def wait(condition, seconds=60):
  """What the condition gives once it gives something true."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if value := condition():
      return value
    time.sleep(0.1)
  raise AssertionError(f'not within {seconds} s')
