"""The README's examples run as they stand, and what it names is there."""

import pathlib
import re

import pytest

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
