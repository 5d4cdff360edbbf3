#!/usr/bin/env bash
# Runs pytest, and those tests that failed once more: tools/pytest_twice.sh PYTHON ...
# Many tests drive several processes, and a loaded machine can outlast a wait of theirs.
# One that fails twice is a failure; one that passes the second time is named here.
set -uo pipefail
python=$1
shift
"$python" -m pytest "$@"
status=$?
# 1: tests failed. All else (a crash, no tests, a wrong argument) stays as it is.
[ "$status" -eq 1 ] || exit "$status"
echo '=== once more, the tests that failed: those that pass now are not steady'
"$python" -m pytest "$@" --last-failed --last-failed-no-failures none -rA
