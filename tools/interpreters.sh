# Which Python a pinned set is built with. For `source`.
#   PYTHON  the interpreter that the user names, for all sets

version_of() { # INTERPRETER
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

has_venv() { # INTERPRETER
  "$1" -c 'import venv, ensurepip' >/dev/null 2>&1
}

fits() { # SET VERSION
  case "$1" in
    cluster) [ "$2" = 3.11 ] ;;
    *) [ "${2%%.*}" = 3 ] && [ "${2#*.}" -ge 11 ] ;;
  esac
}

# The newest that fits and has what it takes; else one whose fault can be told.
python_for() { # SET
  local name version
  if [ -n "${PYTHON:-}" ]; then
    echo "$PYTHON"
    return
  fi
  for name in python3.14 python3.13 python3.12 python3.11 python3; do
    version=$(version_of "$name") && fits "$1" "$version" && has_venv "$name" || continue
    echo "$name"
    return
  done
  command -v python3.11 || echo python3
}
