#!/usr/bin/env bash
# Lint, types and tests on each of the named sets; all stages run, then a report.
#   tools/run_tests.sh cluster latest
#   VENV_ROOT    where the environments lie (default: .venv)
#   PYTEST_ARGS  further arguments to pytest, as "-m 'not learning'" or "tests/x"
set -uo pipefail
cd "$(dirname "$0")/.."
source tools/stages.sh

eval "pytest_args=(${PYTEST_ARGS:-})"
stage 'lint (ruff)' 300 bash tools/lint.sh "${VENV_ROOT:-.venv}/$1/bin"
for set_name in "$@"; do
  bin=${VENV_ROOT:-.venv}/$set_name/bin
  "$bin/python" - "$set_name" <<'PYTHON'
import importlib.metadata
import platform
import sys

names = ('jax', 'flax', 'numpy', 'dm-reverb', 'tensorflow-cpu')
present = {
  d.metadata['Name'].lower(): d.version for d in importlib.metadata.distributions()
}
versions = ', '.join(f'{n} {present.get(n, "absent")}' for n in names)
print(f'\n=== {sys.argv[1]}: Python {platform.python_version()}, {versions}')
PYTHON
  stage "$set_name: types (mypy)" 600 "$bin/python" -m mypy
  stage "$set_name: tests (pytest)" 2400 tools/pytest_twice.sh "$bin/python" \
    "${pytest_args[@]}"
done
report 'make test'
