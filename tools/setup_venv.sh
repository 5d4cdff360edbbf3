#!/usr/bin/env bash
# Makes the virtual environment of one pinned set: tools/setup_venv.sh cluster|latest
#
# Returns at once if the environment holds what requirements/SET.txt names. Otherwise
# it is built anew: the stamp is written last, so an interrupted installation is
# repeated. Whatever goes wrong ends in one line that says what to do.
#   PYTHON     interpreter to build with (default: the newest that fits the set)
#   VENV_ROOT  where the environments lie (default: .venv)
# uv installs the sets. It comes by pip, in the version of requirements/uv.txt, into an
# environment of its own beside them; `tools/setup_venv.sh uv` makes that one alone.
set -uo pipefail
cd "$(dirname "$0")/.."
source tools/interpreters.sh

set_name=${1:-}
case "$set_name" in
  cluster) versions='3.11' need_mb=2900 ;;
  latest) versions='3.11 or newer' need_mb=2100 ;;
  uv) versions='3.11 or newer' need_mb=150 ;;
  *)
    echo "setup: error: set is '$set_name'; allowed: cluster, latest, uv" >&2
    exit 2
    ;;
esac
venv_root=${VENV_ROOT:-.venv}
venv=$venv_root/$set_name
log=$venv_root/$set_name.log
requirements=requirements/$set_name.txt
uv=$venv_root/uv/bin/uv

fail() {
  echo "setup: error: $set_name: $*" >&2
  exit 1
}

is_ready() { # FOLDER REQUIREMENTS
  local present
  [ "$(cat "$1/.installed" 2>/dev/null)" = "$(sha256sum <"$2")" ] || return 1
  present=$(version_of "$1/bin/python") || return 1
  [ "$1" != "$venv" ] || [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$present" ]
}

find_python() {
  python=$(python_for "$set_name")
  local found
  found=$(version_of "$python") ||
    fail "cannot run '$python'; needs Python $versions:" \
      "install it, or name one with PYTHON=/path/to/python3.11"
  if ! fits "$set_name" "$found"; then
    fail "'$python' is Python $found; needs Python $versions:" \
      "name one with PYTHON=/path/to/python3.11$(
        fits latest "$found" && echo ', or take SET=latest'
      )"
  fi
  has_venv "$python" ||
    fail "'$python' lacks the venv module:" \
      "on Debian and Ubuntu run 'apt-get install python$found-venv'"
}

free_mb() {
  df -Pm "$venv_root" | awk 'NR == 2 {print $4}'
}

explain() {
  # A full disk first: it makes other noise, and may cut the log short.
  if [ "$(free_mb)" -lt 20 ] ||
    grep -qiE 'No space left on device|Disk quota exceeded' "$log"; then
    fail "disk full while installing (the cache of uv, and ${TMPDIR:-/tmp}," \
      "need space too); see $log"
  elif grep -qE 'client error \(Connect\)|dns error|timed out|error decoding response body|NewConnectionError|ConnectTimeoutError|ReadTimeoutError|ProxyError|SSLError|ConnectionResetError|NameResolutionError' "$log"; then
    fail "no network: cannot reach the package index$(
      sed -n 's/^ *cause: \(invalid peer certificate.*\)/ (\1)/p' "$log" | head -n 1
    ); see $log"
  fi
  # The last cause that uv gives, or the last line of pip.
  fail "$(grep -v '^hint:\|^ *$' "$log" | tail -n 1 | sed 's/^ *cause: //')" \
    "($(uname -sm)); see $log"
}

export UV_NO_WRAP=1 # Or a cause is cut into lines, of which one is not enough.

# Runs an installer; its words go to the log, and to the screen if there is one.
install() {
  if [ -t 1 ]; then
    "$@" 2>&1 | tee -a "$log" | sed -u '/^ [+] /d'
  else
    "$@" >>"$log" 2>&1
  fi || explain
}

add_uv() {
  is_ready "$venv_root/uv" requirements/uv.txt && return
  rm -rf "$venv_root/uv"
  install "$python" -m venv "$venv_root/uv"
  install "$venv_root/uv/bin/python" -m pip install --disable-pip-version-check \
    --quiet --only-binary :all: -r requirements/uv.txt
  sha256sum <requirements/uv.txt >"$venv_root/uv/.installed"
}

# What pip is told of a mirror of the package index holds for uv as well.
read_pip_settings() {
  local pip=("$venv_root/uv/bin/python" -m pip) value
  value=${PIP_INDEX_URL:-$("${pip[@]}" config get global.index-url 2>/dev/null)}
  [ -z "$value" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$value}
  value=${PIP_CERT:-$("${pip[@]}" config get global.cert 2>/dev/null)}
  [ -z "$value" ] || export SSL_CERT_FILE=${SSL_CERT_FILE:-$value}
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
  elif ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-deps \
    --only-binary :all: --retries 1 --progress-bar off -r "$pins" >>"$log" 2>&1; then
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
exec 9>"$venv_root/.lock" || fail "cannot write under $venv_root"
flock -w 1800 9 || fail "another set-up in $venv_root has held its lock for 30 minutes"

[ -r "$requirements" ] || fail "cannot read $requirements"
if ! is_ready "$venv" "$requirements"; then
  find_python
  rm -rf "$venv"
  [ "$(free_mb)" -ge "$need_mb" ] ||
    fail "disk too full: $(free_mb) MB free under $venv_root, needs $need_mb MB"
  : >"$log" || fail "cannot write $log"
  add_uv
  [ "$set_name" != uv ] || exit 0
  read_pip_settings
  echo "setup: $set_name: $(grep -c == "$requirements") packages into $venv (log: $log)"
  executable=$("$python" -c 'import sys; print(sys.executable)')
  install "$uv" venv --python "$executable" "$venv"
  # The list is complete, so dependencies are not resolved again.
  install "$uv" pip sync --python "$venv/bin/python" --only-binary :all: "$requirements"
  # So that this writes the bytecode of what every process imports, uv compiling none.
  install env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -c 'import flax, jax, optax'
  sha256sum <"$requirements" >"$venv/.installed" || fail "cannot write $venv/.installed"
  echo "setup: $set_name: ready ($("$venv/bin/python" --version))"
  [ "$set_name" != latest ] ||
    echo 'setup: latest: the newest JAX; unrolls travel between processes by TCP. For' \
      'Reverb: SET=cluster, with Python 3.11 (PYTHON=/path/to/python3.11)'
fi
[ "$set_name" = uv ] || add_onednn
