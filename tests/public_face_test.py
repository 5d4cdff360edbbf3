"""`import impala_jax`: what it offers, what type checkers see of it, what it costs."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

import impala_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_import_loads_nothing_else():
  script = (
    'import json, sys\n'
    'before = set(sys.modules)\n'
    'import impala_jax\n'
    'print(json.dumps(sorted(set(sys.modules) - before)))\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', script],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=True,
  )
  assert json.loads(done.stdout) == ['impala_jax']


def test_all_names_are_there_and_listed():
  for name in impala_jax.__all__:
    assert getattr(impala_jax, name) is not None
  assert set(impala_jax.__all__) <= set(dir(impala_jax))


def test_others_are_not():
  with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
    _ = impala_jax.nonsense
  with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
    _ = impala_jax.environments.nonsense


def test_type_checkers_see_real_types(tmp_path):
  lines = ['import impala_jax']
  lines += [f'reveal_type(impala_jax.{name})' for name in impala_jax.__all__]
  lines += [
    'impala_jax.train(nonsense=3)',
    'impala_jax.train(total_frames="many")',
    'impala_jax.nonsense',
    'impala_jax.environments.registry.register(3, 4)',
    'result: impala_jax.TrainResult = impala_jax.train()',
    'returns: float = impala_jax.evaluate(result).mean()',
  ]
  snippet = tmp_path / 'snippet.py'
  snippet.write_text('\n'.join(lines) + '\n')
  done = subprocess.run(
    [sys.executable, '-m', 'mypy', '--config-file', ROOT / 'pyproject.toml', snippet],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=280,
  )
  found = re.findall(r'snippet\.py:(\d+): (\w+): (.*)', done.stdout)
  revealed = {int(n): text for n, kind, text in found if 'Revealed type is' in text}
  errors = {lines[int(n) - 1]: text for n, kind, text in found if kind == 'error'}
  assert len(revealed) == len(impala_jax.__all__), done.stdout + done.stderr
  for number, text in revealed.items():
    assert 'Revealed type is "Any"' not in text, lines[number - 1]
  assert list(errors) == lines[-6:-2], done.stdout
  assert 'Unexpected keyword argument "nonsense"' in errors[lines[-6]]
