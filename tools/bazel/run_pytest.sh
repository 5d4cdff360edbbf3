#!/usr/bin/env bash
# Runs one test file by pytest; started by Bazel in a tree of links to the sources.
set -uo pipefail
# The environment lies in the source tree, to which the links lead.
venv=${IMPALA_JAX_VENV:-$(dirname "$(readlink -f setup.py)")/.venv/cluster}
if [ ! -x "$venv/bin/python" ]; then
  echo "no virtual environment at $venv: run 'make setup' first" >&2
  exit 1
fi
# The sources are read-only here; what tools write goes to the test's own folder.
export HOME=$TEST_TMPDIR HYPOTHESIS_STORAGE_DIRECTORY=$TEST_TMPDIR/hypothesis
export PYTHONDONTWRITEBYTECODE=1
"$venv/bin/python" -m pytest -p no:cacheprovider -m 'not learning' "$1"
status=$?
# 5: no test left. Right where all of a file's tests are learning tests, else not.
if [ "$status" -eq 5 ] && grep -q 'pytest.mark.learning' "$1"; then
  exit 0
fi
exit "$status"
