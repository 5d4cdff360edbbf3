#!/usr/bin/env bash
# Style: tools/lint.sh FOLDER_OF_RUFF
set -euo pipefail
cd "$(dirname "$0")/.."
"$1/ruff" check .
"$1/ruff" format --check .
