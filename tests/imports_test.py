"""The house: which room may import which, and what an import costs.

A room is a folder of `impala_jax`, or a module beside the folders. Rooms stand on
floors; a room imports from floors below its own, and from itself. Rooms of one floor do
not import each other, so there is no circle of rooms.
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

# From the ground up. Names of `impala_jax` are without it; the public face is ''.
FLOORS = (
  ('types',),
  ('runtime',),
  ('onednn', 'unroll_layout', 'vtrace'),
  ('settings',),
  ('suites',),
  ('config',),
  ('environments',),
  ('environments.engines',),
  ('environments.atari', 'environments.dmlab', 'environments.doom'),
  ('agents', 'configs', 'losses', 'optimizers'),
  ('distributed.security',),
  ('distributed.connections',),
  ('distributed.transport',),
  ('distributed.control',),
  ('acting',),
  ('reporting',),
  ('learning',),
  ('components',),
  ('evaluation',),
  ('distributed.gang', 'distributed.inference'),
  ('distributed.roles',),
  ('launching',),
  ('launching.backends',),
  ('training',),
  ('commands',),
  ('',),
  ('experiments',),
  ('launch',),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

Import = collections.namedtuple('Import', 'module lineno at_top')
Arrow = collections.namedtuple('Arrow', 'importer imported path lineno')


def source_files():
  return sorted(f for folder in OURS for f in (ROOT / folder).rglob('*.py'))


def module_name(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


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


def read(path):
  package = module_name(path)
  if path.name != '__init__.py':
    package = package.rpartition('.')[0]
  return imports_of(path.read_text(), package)


def room_of(module):
  """The room of a module: impala_jax.agents.lstm -> agents."""
  top, _, rest = module.partition('.')
  if top != 'impala_jax':
    return top
  while rest not in FLOOR:
    rest, dot, _ = rest.rpartition('.')
    if not dot and rest not in FLOOR:
      raise AssertionError(f'{module} is in no room: give it a floor in FLOORS')
  return rest


def is_module(name):
  path = ROOT / pathlib.Path(*name.split('.'))
  return path.is_dir() or path.with_suffix('.py').is_file()


def arrows_of(path, imports):
  """The imports of a file that leave its room."""
  importer = room_of(module_name(path))
  found = []
  for item in imports:
    # `from impala_jax import types` also names the package itself, which does not
    # count, and `from impala_jax.config import Network` a class.
    if item.module.split('.')[0] not in OURS or not is_module(item.module):
      continue
    if item.module in ('impala_jax', 'impala_jax.distributed'):
      continue
    imported = room_of(item.module)
    if imported != importer:
      found.append(Arrow(importer, imported, path, item.lineno))
  return found


def upward(arrows):
  return [a for a in arrows if FLOOR[a.imported] >= FLOOR[a.importer]]


def all_arrows():
  return [arrow for path in source_files() for arrow in arrows_of(path, read(path))]


def test_arrows_point_downwards():
  arrows = all_arrows()
  assert len({a.importer for a in arrows}) > 20
  problems = [
    f'{a.path}:{a.lineno}: {a.importer} imports {a.imported}' for a in upward(arrows)
  ]
  assert not problems, '\n'.join(problems)


def test_every_room_is_there():
  rooms = {room_of(module_name(path)) for path in source_files()} | {''}
  assert rooms - {'distributed'} == set(FLOOR)


@pytest.mark.parametrize(
  ('file', 'text', 'count'),
  [
    ('impala_jax/vtrace.py', 'from impala_jax import types', 0),
    ('impala_jax/vtrace.py', 'from impala_jax import config', 1),
    ('impala_jax/vtrace.py', 'from impala_jax import unroll_layout', 1),
    ('impala_jax/losses.py', 'def f():\n  import impala_jax.learning', 1),
    ('impala_jax/agents/a.py', 'from ..distributed.transport import protocol', 2),
    ('impala_jax/config.py', 'from impala_jax import suites', 0),
    ('impala_jax/config.py', 'from impala_jax import environments', 1),
    ('impala_jax/suites.py', 'from impala_jax import config', 1),
    ('impala_jax/acting/a.py', 'from impala_jax.acting import actor', 0),
    ('impala_jax/acting/a.py', 'from impala_jax.learning import learner', 2),
    ('impala_jax/learning/a.py', 'from impala_jax.acting import actor', 0),
    ('impala_jax/acting/a.py', 'import experiments.soak', 1),
    ('impala_jax/environments/a.py', 'from impala_jax import vtrace', 0),
    ('impala_jax/environments/a.py', 'from impala_jax.environments import doom', 1),
    ('experiments/soak/run.py', 'import launch', 1),
    ('launch/run.py', 'from experiments import soak', 0),
    ('impala_jax/commands/a.py', 'from impala_jax.launching import backends', 0),
    ('impala_jax/commands/a.py', 'import launch', 1),
    ('impala_jax/launching/a.py', 'from impala_jax.commands import main', 2),
  ],
)
def test_the_check_itself(file, text, count):
  path = ROOT / file
  imports = imports_of(text, module_name(path).rpartition('.')[0])
  assert len(upward(arrows_of(path, imports))) == count


def test_flags_stay_in_the_entry_points():
  for path in source_files():
    relative = path.relative_to(ROOT)
    if relative.parts[0] == 'launch' or relative.parts[:2] == (
      'experiments',
      'benchmarks',
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


def survey():
  """Rooms, pairs of rooms with an arrow, and how many of these point upwards."""
  arrows = all_arrows()
  pairs = {(a.importer, a.imported) for a in arrows}
  up = {(a.importer, a.imported) for a in upward(arrows)}
  return {'rooms': len(FLOOR), 'arrows': len(pairs), 'upward': len(up)}


if __name__ == '__main__':
  print(survey())
