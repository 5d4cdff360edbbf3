"""The direction of imports, and what an import costs.

launch -> experiments -> {distributed, actor, learner, ...} -> {losses, agents,
environments} -> vtrace -> types. Configuration and environments import only types
and each other.
"""

import ast
import collections
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
OURS = ('impala_jax', 'experiments', 'launch')
HEAVY = (
  'ale_py',
  'deepmind_lab',
  'gymnasium',
  'matplotlib',
  'procgen',
  'reverb',
  'tensorflow',
  'torch',
  'vizdoom',
)

# Each unit imports units of its own layer and of those below.
LAYERS = (
  {'impala_jax.types'},
  {'impala_jax.onednn', 'impala_jax.unroll_layout', 'impala_jax.vtrace'},
  {'impala_jax.config', 'impala_jax.config_validation', 'impala_jax.environments'},
  {'impala_jax.agents', 'impala_jax.losses', 'impala_jax.optimizers'},
  {'the rest of impala_jax'},  # Actor, learner, distributed and what they share.
  {'impala_jax'},  # The public interface.
  {'experiments'},
  {'launch'},
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
# Narrower than the layers.
SETTINGS = {'impala_jax.config', 'impala_jax.config_validation'}
ONLY = {
  'impala_jax.onednn': {'impala_jax.types'},
  'impala_jax.vtrace': {'impala_jax.types'},
  'impala_jax.unroll_layout': {'impala_jax.types'},
  'impala_jax.environments': {'impala_jax.types', *SETTINGS},
} | {
  unit: {'impala_jax.types', 'impala_jax.environments', *SETTINGS} for unit in SETTINGS
}

Import = collections.namedtuple('Import', 'module lineno at_top')


def source_files():
  return sorted(f for folder in OURS for f in (ROOT / folder).rglob('*.py'))


def module_name(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def is_ours(module):
  return module.split('.')[0] in OURS


def imports_of(text, package=''):
  """All imports in the source `text`, with `from a import b` as both a and a.b."""
  found = []
  tree = ast.parse(text)
  inner = {
    node
    for function in ast.walk(tree)
    if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    for node in ast.walk(function)
  }
  for node in ast.walk(tree):
    at_top = node not in inner
    if isinstance(node, ast.Import):
      found += [Import(alias.name, node.lineno, at_top) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ''
      if node.level:
        stem = package.split('.')[: -(node.level - 1) or None]
        base = '.'.join([*stem, *([base] if base else [])])
      found.append(Import(base, node.lineno, at_top))
      found += [
        Import(f'{base}.{alias.name}', node.lineno, at_top) for alias in node.names
      ]
  return found


def unit_of(module):
  """The unit that holds `module`: impala_jax.agents.lstm -> impala_jax.agents."""
  parts = module.split('.')
  if parts[0] != 'impala_jax' or len(parts) == 1:
    return parts[0]
  unit = '.'.join(parts[:2])
  return unit if unit in RANK else 'the rest of impala_jax'


def is_module(name):
  path = ROOT / pathlib.Path(*name.split('.'))
  return path.is_dir() or path.with_suffix('.py').is_file()


def wrong_imports(path, imports):
  """One line for each import that points upwards."""
  importer = unit_of(module_name(path))
  problems = []
  for item in imports:
    # `from impala_jax import types` also names the package itself, which does not
    # count, and `from impala_jax.config import Network` a class.
    if not is_ours(item.module) or not is_module(item.module):
      continue
    imported = unit_of(item.module)
    if imported == 'impala_jax':
      continue
    if importer in ONLY:
      allowed = imported == importer or imported in ONLY[importer]
    else:
      allowed = RANK[imported] <= RANK[importer]
    if not allowed:
      problems.append(f'{path}:{item.lineno}: {importer} imports {item.module}')
  return problems


def read(path):
  package = module_name(path)
  if path.name != '__init__.py':
    package = package.rpartition('.')[0]
  return imports_of(path.read_text(), package)


def test_imports_point_downwards():
  files = source_files()
  assert len(files) > 10
  problems = [p for f in files for p in wrong_imports(f, read(f))]
  assert not problems, '\n'.join(problems)


@pytest.mark.parametrize(
  ('file', 'text', 'count'),
  [
    ('impala_jax/vtrace.py', 'from impala_jax import types', 0),
    ('impala_jax/vtrace.py', 'from impala_jax import config', 1),
    ('impala_jax/losses.py', 'def f():\n  import impala_jax.learning', 1),
    ('impala_jax/agents/a.py', 'from ..distributed import transport', 2),
    ('impala_jax/config.py', 'from impala_jax import environments', 0),
    ('impala_jax/config.py', 'from impala_jax import agents', 1),
    ('impala_jax/acting/a.py', 'from impala_jax.learning import learner', 0),
    ('impala_jax/acting/a.py', 'import experiments.soak', 1),
    ('impala_jax/environments/a.py', 'from impala_jax import vtrace', 1),
    ('impala_jax/environments/a.py', 'from impala_jax.environments import base', 0),
    ('experiments/soak/run.py', 'import launch', 1),
    ('launch/run.py', 'from experiments import soak', 0),
  ],
)
def test_the_check_itself(file, text, count):
  path = ROOT / file
  imports = imports_of(text, module_name(path).rpartition('.')[0])
  assert len(wrong_imports(path, imports)) == count


def test_flags_stay_in_the_entry_points():
  for path in source_files():
    relative = path.relative_to(ROOT)
    if relative.parts[0] == 'launch' or relative.parts[:2] in (
      ('experiments', 'benchmarks'),
      ('impala_jax', 'launching'),
    ):
      continue
    names = {item.module for item in read(path)}
    assert not names & {'absl.flags', 'absl.app'}, relative


def test_heavy_packages_are_imported_on_use():
  """Modules are free to import them at the top only if nothing imports those first.

  So that the rule stays simple: in impala_jax they are imported inside functions.
  """
  for path in sorted((ROOT / 'impala_jax').rglob('*.py')):
    at_top = {i.module.split('.')[0] for i in read(path) if i.at_top}
    assert not at_top & set(HEAVY), path


def test_importing_everything_loads_no_heavy_package():
  """Every module of the package is imported, in a process of its own."""
  modules = [module_name(f) for f in source_files() if f.parts[-2] != 'benchmarks']
  modules = [m for m in modules if m.startswith('impala_jax')]
  # Both define the same flags: they are commands, and move to the other commands.
  modules = [m for m in modules if not m.endswith(('.supervise', '.local_gang'))]
  script = (
    'import importlib, json, sys\n'
    f'for name in {modules!r}: importlib.import_module(name)\n'
    f'print(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))\n'
  )
  result = subprocess.run(
    [sys.executable, '-c', script],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert result.returncode == 0, result.stderr
  assert json.loads(result.stdout.splitlines()[-1]) == []
