"""Why a process ended, whatever its words are written in."""

import os
import subprocess
import sys

import pytest

from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory
from tests import strange_machine


@pytest.mark.parametrize('cause', ['ValueError: no level 实验', 'a \udcff byte'])
def test_the_cause_gets_through_terminals_that_cannot_show_it(tmp_path, cause):
  run = RunDirectory(tmp_path)
  role = f'print({"CAUSE: " + cause!a}); raise SystemExit(1)'
  supervisor = subprocess.run(
    [
      sys.executable,
      '-m',
      'impala_jax.launching.supervise',
      'actor',
      '--max_restarts=0',
      '--',
      sys.executable,
      '-c',
      role,
    ],
    env={**strange_machine.Machine().environment, 'IMPALA_RUN_DIR': str(tmp_path)},
    capture_output=True,
    timeout=120,
    check=False,
  )
  assert supervisor.returncode == 1
  said = cause.encode('utf-8', 'backslashreplace').decode()
  assert said in files.read_json(run.supervised('actor', 0))['words']
  assert f'CAUSE: {said}\n' == run.log('actor', 0).read_text('utf-8')
  assert said.encode('ascii', 'replace').decode() in os.fsdecode(supervisor.stdout)
