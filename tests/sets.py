"""`--second-set`: leaves out the tests to which the set of packages cannot matter.

They are those of the files that reach no JAX, neither by what they import nor by what
they name in a string (a script, a command to start). They have run on the first set.
Where the rule is wrong, the mark `every_set` says so.
"""

import ast
import functools
import pathlib
import re

from tests import imports_test

_OURS = (*imports_test.OURS, 'tests')
_MODULE = re.compile(rf'\b(?:jax|(?:{"|".join(_OURS)})(?:\.\w+)+)\b')
_TESTS = imports_test.ROOT / 'tests'


def pytest_addoption(parser):
  parser.addoption('--second-set', action='store_true', help=__doc__)


def pytest_collection_modifyitems(config, items):
  if not config.getoption('second_set'):
    return
  kept = [i for i in items if i.get_closest_marker('every_set') or reaches_jax(i.path)]
  config.hook.pytest_deselected(items=[i for i in items if i not in set(kept)])
  items[:] = kept


def reaches_jax(test: pathlib.Path) -> bool:
  """Whether JAX can be in what the tests of a file run."""
  seen: set[tuple[pathlib.Path, bool]] = set()
  todo = [(test, True)]  # Files, and whether functions that import are called there.
  while todo:
    file, called = todo.pop()
    if (file, called) in seen:
      continue
    seen.add((file, called))
    imports, commands = _references(file)
    imported = [i.module for i in imports if called or i.at_top]
    if any(name.split('.')[0] == 'jax' for name in [*imported, *commands]):
      return True
    in_tests = file.is_relative_to(_TESTS)
    todo += [(f, in_tests) for name in imported for f in _files(name)]
    todo += [(f, True) for name in commands for f in _files(name)]
  return False


@functools.cache
def _references(file: pathlib.Path):
  """(imports of a file, modules that its strings name)."""
  imports = imports_test.read(file)
  if file.name == '__init__.py':
    return imports, []  # The public names, which load their modules when they are used.
  tree = ast.parse(file.read_text())
  prose = {n.value for n in ast.walk(tree) if isinstance(n, ast.Expr)}
  strings = [
    n.value
    for n in ast.walk(tree)
    if isinstance(n, ast.Constant) and isinstance(n.value, str) and n not in prose
  ]
  if file.is_relative_to(_TESTS):  # Where a string may be a script.
    return imports, [name for s in strings for name in _MODULE.findall(s)]
  return imports, [s for s in strings if _MODULE.fullmatch(s)]


def _files(name: str) -> list[pathlib.Path]:
  """The files of this tree that an import of `name`, or of its module, runs."""
  parts = name.split('.')
  if parts[0] not in _OURS:
    return []
  stems = [imports_test.ROOT.joinpath(*parts[: n + 1]) for n in range(len(parts))]
  places = [f for s in stems for f in (s.with_suffix('.py'), s / '__init__.py')]
  return [f for f in places if f.is_file()]
