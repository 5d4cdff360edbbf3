#!/usr/bin/env bash
# Renews the pins of one set to the newest versions that setup.py and the set allow:
#   tools/renew_requirements.sh cluster|latest [PYTHON]
# Writes requirements/SET.txt; run `make test` before you commit it.
set -euo pipefail
cd "$(dirname "$0")/.."

set_name=${1:?which set: cluster or latest}
python=${2:-python3.11}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip)
extras='.[atari,dev,doom,gymnasium,plots,video]'

case "$set_name" in
  cluster)
    # JAX 0.7.1 is the newest that accepts numpy 1; tensorboard 2.15 needs
    # pkg_resources, which setuptools has dropped since.
    printf '%s\n' jax==0.7.1 jaxlib==0.7.1 flax==0.12.0 'numpy<2' ml-dtypes==0.5.4 \
      'protobuf<5' 'setuptools<79' >"$work/limits"
    "${pip[@]}" install --upgrade -c "$work/limits" setuptools "$extras"
    "${pip[@]}" install --no-deps dm-reverb==0.14.0 tensorflow-cpu==2.15.1
    # All that these two ask for, save the ml-dtypes that JAX would refuse.
    "$work/venv/bin/python" - >"$work/wanted" <<'PYTHON'
import importlib.metadata
import packaging.requirements as pr

for name in ('dm-reverb', 'tensorflow-cpu'):
  for line in importlib.metadata.requires(name):
    requirement = pr.Requirement(line)
    marker = requirement.marker
    if requirement.name != 'ml-dtypes' and (
      marker is None or marker.evaluate({'extra': ''})
    ):
      print(f'{requirement.name}{requirement.specifier}')
PYTHON
    "${pip[@]}" install -c "$work/limits" -r "$work/wanted"
    note='Reverb and the newest JAX beside it. TensorFlow asks for an older ml-dtypes
# than JAX; 0.5.4 works with both.'
    ;;
  latest)
    "${pip[@]}" install --upgrade setuptools "$extras"
    note='The newest JAX and numpy; no Reverb, no TensorFlow.'
    ;;
  *)
    echo "set is '$set_name'; allowed: cluster, latest" >&2
    exit 2
    ;;
esac
{
  echo "# $note"
  echo '# Complete: install with `pip install --no-deps -r`, as `make setup` does.'
  echo "# Renew with tools/renew_requirements.sh $set_name."
  "${pip[@]}" freeze --all --exclude pip --exclude impala_jax
} >"$work/list"
grep -v '^#' "$work/list" | grep -vE '^[A-Za-z0-9._-]+==[0-9A-Za-z.+!]+$' &&
  { echo 'not a plain pin: see above' >&2; exit 1; }
mv "$work/list" "requirements/$set_name.txt"
echo "wrote requirements/$set_name.txt; now run: make test"
