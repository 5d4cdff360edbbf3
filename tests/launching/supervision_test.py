"""What a supervisor is told: the command line says all of it, whatever it is."""

import dataclasses
import signal
import sys
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from impala_jax.launching import supervise, supervision
from impala_jax.runtime.run_directory import RunDirectory

words = st.text('abcXYZ_-', min_size=1).filter(lambda x: not x.startswith('-'))
numbers = st.floats(0, 1e6).map(lambda x: float(f'{x:g}'))
by_type = {str: words, int: st.integers(0, 10**9), float: numbers, bool: st.booleans()}
hints = typing.get_type_hints(supervision.Settings)
settings = st.builds(
  supervision.Settings,
  command=st.lists(st.text(min_size=1), min_size=1).map(tuple),
  **{name: by_type[hint] for name, hint in hints.items() if hint in by_type},
)


@given(settings)
def test_arguments_are_read_back(made):
  assert supervise.parse(made.arguments()) == made


def test_every_field_travels():
  left = {n for n, hint in hints.items() if hint not in by_type}
  assert left == {'command'}
  assert {f.name for f in dataclasses.fields(supervision.Settings)} == set(hints)


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (['actor'], 'no command'),
    (['actor', '--indx=3', '--', 'true'], '--indx=3'),
    (['actor', '--index=three', '--', 'true'], 'three'),
    ([], 'role'),
  ],
)
def test_mistakes_end_with_one_line(arguments, words, capsys):
  with pytest.raises(SystemExit) as e:
    supervise.parse(arguments)
  assert e.value.code == 2
  assert words in capsys.readouterr().err


def test_what_it_starts_does_not_get_the_signal_that_is_its_own(tmp_path):
  """As where Slurm tells every process of a step that the time is over."""
  script = (
    'import os, pathlib, signal, sys\n'
    'os.kill(os.getpid(), signal.SIGUSR1)\n'
    'os.system(f"kill -USR1 $$")\n'
    'pathlib.Path(sys.argv[1]).touch()\n'
  )
  done = tmp_path / 'done'
  settings = supervision.Settings(
    'learner', (sys.executable, '-c', script, str(done)), once=True
  )
  run = RunDirectory(tmp_path / 'run')
  run.path.mkdir()
  process = supervision.Supervised(settings, run, say=lambda _: None)
  assert process.run() == 0
  assert done.exists()
  # The thread that started it gets it as ever.
  assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
