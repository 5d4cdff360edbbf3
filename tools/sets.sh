#!/usr/bin/env bash
# Prints the pinned sets that the interpreters here allow, the default one first.
set -uo pipefail
source "$(dirname "$0")/interpreters.sh"
for name in cluster latest; do
  python=$(python_for $name)
  if version=$(version_of "$python") && fits $name "$version"; then
    found="${found:-}${found:+ }$name"
  fi
done
# Without any, its set-up says what is missing.
echo "${found:-latest}"
