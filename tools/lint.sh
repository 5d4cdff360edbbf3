#!/usr/bin/env bash
# Style and types: tools/lint.sh FOLDER..., each with the ruff and mypy of one set.
set -euo pipefail
cd "$(dirname "$0")/.."
"$1/ruff" check .
"$1/ruff" format --check .
for folder in "$@"; do
  "$folder/python" -m mypy
done
