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
  todo = [(test, False)]  # Files, and whether all that they may import counts.
  while todo:
    file, whole = todo.pop()
    if (file, whole) in seen:
      continue
    seen.add((file, whole))
    imports, commands = _references(file)
    if not whole and not file.is_relative_to(_TESTS):
      imports = [i for i in imports if i.at_top]
    imported = [i.module for i in imports]
    if any(name.split('.')[0] == 'jax' for name in [*imported, *commands]):
      return True
    todo += [(f, whole) for name in imported for f in _files(name)]
    todo += [(f, True) for name in commands for f in _files(name)]
  return False


@functools.cache
def _references(file: pathlib.Path):
  """(imports of a file, modules that it names besides)."""
  imports, tree = imports_test.read(file), ast.parse(file.read_text())
  if file.name == '__init__.py':
    # Its names load on use, and what stands below an `if` is for type checkers.
    lines = {node.lineno for node in tree.body}
    return [i for i in imports if i.lineno in lines], []
  prose = {n.value for n in ast.walk(tree) if isinstance(n, ast.Expr)}
  strings = [
    n.value
    for n in ast.walk(tree)
    if isinstance(n, ast.Constant) and isinstance(n.value, str) and n not in prose
  ]
  if not file.is_relative_to(_TESTS):
    return imports, [s for s in strings if _MODULE.fullmatch(s)]
  # A string of a test may be a script; and the public face leads anywhere.
  names = [name for s in strings for name in _MODULE.findall(s)]
  plain = [n for n in ast.walk(tree) if isinstance(n, ast.Import)]
  face = any(alias.name == 'impala_jax' for n in plain for alias in n.names)
  return imports, names + ['jax'] * face


def _files(name: str) -> list[pathlib.Path]:
  """The files of this tree that an import of `name`, or of its module, runs."""
  parts = name.split('.')
  if parts[0] not in _OURS:
    return []
  stems = [imports_test.ROOT.joinpath(*parts[: n + 1]) for n in range(len(parts))]
  places = [f for s in stems for f in (s.with_suffix('.py'), s / '__init__.py')]
  return [f for f in places if f.is_file()]
