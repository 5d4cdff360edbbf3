#!/usr/bin/env bash
# Makes the virtual environment of one pinned set: tools/setup_venv.sh cluster|latest
#
# Returns at once if the environment holds what requirements/SET.txt names. Otherwise
# it is built anew: the stamp is written last, so an interrupted installation is
# repeated. Whatever goes wrong ends in one line that says what to do.
#   PYTHON     interpreter to build with (default: python3.11, else python3)
#   VENV_ROOT  where the environments lie (default: .venv)
set -uo pipefail
cd "$(dirname "$0")/.."

set_name=${1:-}
case "$set_name" in
  cluster) versions='3.11' need_mb=3400 ;;
  latest) versions='3.11 3.12 3.13' need_mb=2100 ;;
  *)
    echo "setup: error: set is '$set_name'; allowed: cluster, latest" >&2
    exit 2
    ;;
esac
venv_root=${VENV_ROOT:-.venv}
venv=$venv_root/$set_name
log=$venv_root/$set_name.log
stamp=$venv/.installed
requirements=requirements/$set_name.txt

fail() {
  echo "setup: error: $set_name: $*" >&2
  exit 1
}

version_of() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

is_ready() {
  [ "$(cat "$stamp" 2>/dev/null)" = "$checksum" ] || return 1
  local present
  present=$(version_of "$venv/bin/python") || return 1
  [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$present" ]
}

find_python() {
  python=${PYTHON:-$(command -v python3.11 || echo python3)}
  local found
  found=$(version_of "$python") ||
    fail "cannot run '$python'; needs Python ${versions// / or }:" \
      "install it, or name one with PYTHON=/path/to/python3.11"
  case " $versions " in
    *" $found "*) ;;
    *)
      fail "'$python' is Python $found; needs Python ${versions// / or }:" \
        "name one with PYTHON=/path/to/python${versions%% *}"
      ;;
  esac
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "'$python' lacks the venv module:" \
      "on Debian and Ubuntu run 'apt-get install python$found-venv'"
}

free_mb() {
  df -Pm "$venv_root" | awk 'NR == 2 {print $4}'
}

check_disk() {
  [ "$(free_mb)" -ge "$need_mb" ] ||
    fail "disk too full: $(free_mb) MB free under $venv_root, needs $need_mb MB"
}

explain() {
  # A full disk first: it makes other noise, and may cut the log short.
  if [ "$(free_mb)" -lt 20 ] ||
    grep -qiE 'No space left on device|Disk quota exceeded' "$log"; then
    fail "disk full while installing (pip also uses ${TMPDIR:-/tmp}); see $log"
  elif grep -qE 'NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|ConnectionResetError|name resolution|Network is unreachable|Connection refused|Connection timed out' "$log"; then
    fail "no network: pip cannot reach the package index; see $log"
  elif grep -q 'from versions: none' "$log"; then
    fail "the package index does not answer or has no $(
      grep -m1 -oP 'No matching distribution found for \K\S+' "$log"
    ) for this machine ($(uname -sm)); see $log"
  elif grep -q 'No matching distribution found' "$log"; then
    fail "$(grep -m1 -o 'No matching distribution found.*' "$log")" \
      "($(uname -sm), Python $(version_of "$venv/bin/python")); see $log"
  fi
  fail "pip failed: $(grep -v '^$' "$log" | tail -n 1); see $log"
}

show_progress() {
  local line count=0
  while read -r line; do
    [ -t 1 ] || continue
    case "$line" in
      Collecting* | Processing*)
        count=$((count + 1))
        printf '\rsetup: %s: fetched %d of %d ' "$set_name" "$count" "$total"
        ;;
      Installing*) printf '\nsetup: %s: installing\n' "$set_name" ;;
    esac
  done
}

# oneDNN and what calls it: optional, so whatever fails here is a line in the log.
add_onednn() {
  local pins=requirements/onednn.txt calls=impala_jax/onednn/calls.c
  local wanted compiler target
  [ -e "$pins" ] && [ -e "$calls" ] || return 0
  compiler=$(command -v "${CC:-cc}") || compiler=none
  wanted="$(cat "$pins" "$calls" | sha256sum) $compiler"
  [ "$(cat "$venv/.onednn" 2>/dev/null)" = "$wanted" ] && return 0
  if [ "$compiler" = none ]; then
    echo "setup: $set_name: no C compiler, so convolutions will be XLA's (slower on CPU)"
  elif ! PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install --no-deps \
    --only-binary :all: --retries 1 --progress-bar off -r "$pins" >>"$log" 2>&1 9>&-; then
    echo "setup: $set_name: no oneDNN, so convolutions will be XLA's; see $log"
    return 0 # Perhaps the next time.
  else
    target=$("$venv/bin/python" -c 'import sysconfig as s
print(s.get_path("platlib") + "/impala_jax_onednn" + s.get_config_var("EXT_SUFFIX"))') &&
      "$compiler" -O2 -shared -fPIC -pthread -o "$target.new" "$calls" >>"$log" 2>&1 &&
      mv "$target.new" "$target" ||
      echo "setup: $set_name: cannot compile $calls, so convolutions will be XLA's; see $log"
  fi
  echo "$wanted" >"$venv/.onednn"
}

mkdir -p "$venv_root" 2>/dev/null || fail "cannot make the folder $venv_root"
# Two makes at once must not build into the same folder.
exec 9>"$venv_root/$set_name.lock" || fail "cannot write under $venv_root"
flock -w 1800 9 || fail "another set-up of $venv has held its lock for 30 minutes"

checksum=$(sha256sum <"$requirements") || fail "cannot read $requirements"
if is_ready; then
  add_onednn
  exit 0
fi
find_python
rm -rf "$venv"
check_disk
total=$(grep -cE '^[A-Za-z0-9]' "$requirements")
echo "setup: $set_name: $total packages into $venv (some minutes; log: $log)"
"$python" -m venv "$venv" >"$log" 2>&1 || explain
# The list is complete, and TensorFlow's metadata refuses an ml-dtypes that works:
# dependencies are not resolved again.
PIP_DEFAULT_TIMEOUT=${PIP_DEFAULT_TIMEOUT:-30} PIP_RETRIES=${PIP_RETRIES:-3} \
  PIP_DISABLE_PIP_VERSION_CHECK=1 \
  "$venv/bin/python" -m pip install --no-deps --only-binary :all: \
  --progress-bar off -r "$requirements" 2>&1 9>&- | tee -a "$log" | show_progress
[ "${PIPESTATUS[0]}" -eq 0 ] || explain
"$venv/bin/python" -c 'import flax, jax, optax' >>"$log" 2>&1 || explain
echo "$checksum" >"$stamp" || fail "cannot write $stamp"
add_onednn
echo "setup: $set_name: ready ($("$venv/bin/python" --version))"
