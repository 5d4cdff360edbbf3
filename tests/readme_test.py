"""The README's examples run as they stand, and what it names is there."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

from impala_jax.commands import main

pytestmark = pytest.mark.every_set

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_TEXT = (_ROOT / 'README.md').read_text()
_EXAMPLES = re.findall(r'```python\n(.*?)```', _TEXT, re.DOTALL)


@pytest.mark.parametrize('index', range(len(_EXAMPLES)))
def test_python_example_runs(index):
  scope: dict = {}
  exec(compile(_EXAMPLES[index], f'README example {index}', 'exec'), scope)
  result = scope['result']
  assert result.records[-1]['frames'] >= 20_000
  assert result.episode_return == result.episode_return  # Not NaN.


def test_there_are_examples():
  assert len(_EXAMPLES) == 3


def test_linked_files_exist():
  links = re.findall(r'\]\(([^)#:]+)\)', _TEXT)
  assert links
  missing = [link for link in links if not (_ROOT / link).exists()]
  assert not missing


def _table():
  """What stands in backticks in the first column of the table of the interface."""
  section = _TEXT.split('## Public interface')[1].split('\n## ')[0]
  cells = re.findall(r'^\| (`.*?) \|', section, re.MULTILINE)
  return [name for cell in cells for name in re.findall(r'`([^`]+)`', cell)]


def _names():
  """The expressions that a program may write: `train(config)` as impala_jax.train."""
  for text in _table():
    if ' ' not in text.partition('(')[0]:
      name = re.match(r'[\w.]+', text).group()
      yield name if name.startswith('impala_jax.') else f'impala_jax.{name}'


def test_the_table_names_the_interface():
  assert len(list(_names())) >= 12
  assert 'impala_jax.vtrace.vtrace' in _names()
  assert 'impala_jax.ConfigError' in _names()


# Evaluates each name in a process that has imported nothing else of the package.
_EACH = """
import os, sys
import flax.linen, jax, optax  # Once for all of them.
import impala_jax
assert [m for m in sys.modules if m.startswith('impala_jax')] == ['impala_jax']
for name in sys.argv[1:]:
  if os.fork() == 0:
    eval(name)
    os._exit(0)
  if os.wait()[1]:
    print(name)
"""


def test_every_name_of_the_table_is_there_after_the_import_alone():
  done = subprocess.run(
    [sys.executable, '-c', _EACH, *_names(), 'impala_jax.nonsense'],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert done.stdout == 'impala_jax.nonsense\n', done.stderr


def test_every_command_of_the_table_is_there():
  commands = [text.split() for text in _table() if ' ' in text.partition('(')[0]]
  ours = [words[1] for words in commands if words[0] == 'impala']
  assert set(ours) <= set(main.COMMANDS)
  assert {'train', 'dmlab30', 'evaluate', 'plot', 'compare', 'manage', 'list'} <= set(
    ours
  )
  modules = [words[2] for words in commands if words[:2] == ['python', '-m']]
  for module in modules:
    assert importlib.util.find_spec(module.rstrip('.…')), module
