#!/usr/bin/env bash
# Sets up the named sets and runs the tests on each, lint and types beside them.
#   tools/run_tests.sh cluster latest
#   VENV_ROOT    where the environments lie (default: .venv)
#   PYTEST_ARGS  further arguments to pytest, as "-m 'not learning'" or "tests/x"
set -uo pipefail
cd "$(dirname "$0")/.."
source tools/stages.sh
# Or every one of the many processes would compile the packages that it imports.
unset PYTHONDONTWRITEBYTECODE

eval "pytest_args=(${PYTEST_ARGS:-})"
bins=("${@/#/${VENV_ROOT:-.venv}/}")
bins=("${bins[@]/%//bin}")
for set_name in "$@"; do
  stage "$set_name: set-up" 3600 tools/setup_venv.sh "$set_name"
done
if [ ${#stage_failures[@]} -gt 0 ]; then
  report 'make test'
  exit 1
fi
# Half of what they do is to wait for processes that start, so one more than cores.
workers=$((($(nproc) * 3 + 1) / 2))
workers=$((workers > 8 ? 8 : workers))
beside 'lint and types' 1200 nice tools/lint.sh "${bins[@]}"
# The first set runs all tests; where the set cannot matter, the others do not again.
only=()
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
  counts=$STAGES_FOLDER/$set_name.xml
  stage "$set_name: tests" 2400 "$bin/python" -m pytest -n "$workers" \
    --dist loadgroup --no-loadscope-reorder --durations=25 --junitxml="$counts" \
    "${only[@]}" "${pytest_args[@]}"
  stage_lines[-1]+=", $(grep -oE '(tests|skipped|failures|errors)="[0-9]+"' "$counts" 2>/dev/null |
    tr -d '"' | tr '\n' ' ')"
  only=(--second-set)
done
join
report 'make test'
