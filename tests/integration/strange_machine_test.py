"""A whole run where the user's shell, terminal and machine do all to be in the way."""

import os
import subprocess
import sys

import pytest

from impala_jax.runtime import files, role_environment
from impala_jax.runtime.run_directory import RunDirectory
from tests import strange_machine

pytest.importorskip('reverb', reason='Reverb is not installed (latest set)')
# Of what native libraries and JAX say, which frightens for nothing.
_FRIGHTENING = ('Unable to initialize backend', 'os.fork', 'owned by the same process')


def test_a_run_trains_and_frightens_nobody(tmp_path):
  machine = strange_machine.Machine()
  environment = {k: v for k, v in machine.environment.items() if k != 'XLA_FLAGS'}
  # A shell in a pod of another run.
  elsewhere = {'host': 'learner-0.other', 'count': 3, 'queue_port': 9, 'patience': 0.1}
  environment |= role_environment.variables(**elsewhere)
  # As a shell would hand it over, whatever Python takes it for.
  folder = os.fsencode(tmp_path / '实验 50% "\'\\\udcff')
  done = subprocess.run(
    [
      *machine.enter,
      sys.executable,
      '-m',
      'launch.run_atari',
      '--config=catch',
      '--total_frames=8000',
      '--view=plain',
      '--transport=reverb',
      '--set=inference.servers=1',
      '--set=evaluator.enabled=false',
      b'--run_dir=' + folder,
    ],
    env=environment,
    capture_output=True,
    timeout=240,
    check=False,
  )
  output = (done.stdout + done.stderr).decode('ascii')
  assert done.returncode == 0, output
  (run_dir,) = tmp_path.iterdir()
  assert os.fsencode(run_dir) == folder
  run = RunDirectory(run_dir)
  assert files.read_json_lines(run.metrics)[-1]['frames'] >= 8000
  for log in run.logs.iterdir():
    text = log.read_text('utf-8')
    assert not [word for word in _FRIGHTENING if word in text], text
