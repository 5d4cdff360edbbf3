"""One module names the files of a run; a new launch forgets how the last one went."""

import ast
import pathlib

from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory

ROOT = pathlib.Path(__file__).parents[2]


def names():
  """Of files directly in the directory, without those that carry a number."""
  run = RunDirectory(pathlib.Path('/run'))
  found = [
    getattr(run, name)
    for name, value in vars(RunDirectory).items()
    if isinstance(value, property)
  ]
  return {path.name for path in found if path.suffix}


def test_no_other_module_names_the_files():
  assert {'config.json', 'metrics.jsonl', 'ended.json'} <= names()
  naming = set()
  for path in (ROOT / 'impala_jax').rglob('*.py'):
    tree = ast.parse(path.read_text())
    constants = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    if constants & names():
      naming.add(str(path.relative_to(ROOT / 'impala_jax')))
  assert naming == {'runtime/run_directory.py'}


def test_the_first_reason_of_an_end_stands(tmp_path):
  run = RunDirectory(tmp_path)
  assert run.how_ended() == {}
  run.end('failed', 'no such game')
  run.end('stopped')
  assert (run.how_ended()['reason'], run.how_ended()['cause']) == (
    'failed',
    'no such game',
  )


def test_a_new_launch_keeps_incarnations_alone(tmp_path):
  run = RunDirectory(tmp_path)
  run.end('finished')
  record = run.supervised('actor', 3)
  record.parent.mkdir()
  files.write_json(record, {'incarnation': 7, 'state': 'failed'})
  stale = [run.status, run.address(0), run.address(2), run.inference_address(1)]
  for path in stale:
    files.write_json(path, {})
  files.write_json(run.launch, {})
  run.begin_launch()
  assert not any(path.exists() for path in (*stale, run.ended))
  assert files.read_json(record) == {'incarnation': 7}
  assert run.launch.exists()
