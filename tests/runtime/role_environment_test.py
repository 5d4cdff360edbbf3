"""Variables by which launchers tell a role's process what it is."""

import pathlib

import pytest

from impala_jax.runtime import role_environment
from impala_jax.runtime.role_environment import RoleEnvironment

ROOT = pathlib.Path(__file__).parents[2]


def test_what_is_written_is_read_back():
  here = RoleEnvironment(
    pathlib.Path('/shared/run'), 3, 4, 1001, 77, 'node-7', 5001, 5002, 5003, 12.5
  )
  assert RoleEnvironment.read(role_environment.variables(**vars(here))) == here
  assert RoleEnvironment.read({}) == RoleEnvironment()


@pytest.mark.parametrize(
  ('name', 'value', 'words'),
  [
    ('IMPALA_INDEX', '-1', r"IMPALA_INDEX is '-1': must lie in \[0, 2147483648\)"),
    ('IMPALA_COUNT', '0', r"IMPALA_COUNT is '0': must lie in \[1, 65536\)"),
    ('IMPALA_QUEUE_PORT', '65536', r"IMPALA_QUEUE_PORT is '65536'"),
    ('IMPALA_CONTROL_PORT', 'http', r"IMPALA_CONTROL_PORT is 'http'"),
    ('IMPALA_PARENT', '٣', r"IMPALA_PARENT is '٣'"),
  ],
)
def test_what_is_out_of_range_is_named(name, value, words):
  with pytest.raises(ValueError, match=words):
    RoleEnvironment.read({name: value})


def test_no_other_field_is_written():
  with pytest.raises(TypeError, match='prot'):
    role_environment.variables(prot=1)


def test_no_other_module_reads_them():
  names = role_environment.variables(**vars(RoleEnvironment()))
  naming = {
    str(path.relative_to(ROOT))
    for path in (ROOT / 'impala_jax').rglob('*.py')
    if any(f"'{name}'" in path.read_text() for name in names)
  }
  assert naming == {
    'impala_jax/runtime/role_environment.py',
    'impala_jax/launching/supervise.py',  # Whether there is a run at all.
    # A pod's index comes from its annotations, by reference.
    'impala_jax/launching/backends/kubernetes_pods.py',
  }
