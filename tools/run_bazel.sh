#!/usr/bin/env bash
# A few tests by Bazel, or those named, with the packages of the cluster set; leaves no
# server behind. Nothing is downloaded but the packages of the virtual environment, if
# they are not there yet.
set -uo pipefail
cd "$(dirname "$0")/.."
tools/setup_venv.sh cluster || exit 1
[ -z "${VENV_ROOT:-}" ] || export IMPALA_JAX_VENV=$(realpath "$VENV_ROOT")/cluster
trap 'bazel shutdown' EXIT
# Outside of Bazel's sandbox, as `make test` runs them: in its user namespace some kernels
# refuse the filter that keeps Reverb's port to loopback.
bazel test --strategy=TestRunner=local "${@:-//:smoke}"
