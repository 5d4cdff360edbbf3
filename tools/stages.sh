# Sourced by the scripts that run several stages and report on each.
#   stage NAME SECONDS COMMAND...   runs it, at most that long, and notes how it went
#   report                          prints all stages; returns 1 if one failed
stage_lines=()
stage_failures=()

stage() {
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  echo "=== $name: $*"
  # `timeout` ends the whole process group of the command, and so does Ctrl-C: a
  # stage leaves nothing behind.
  timeout --kill-after=30 "$limit" "$@" &
  trap "kill $! 2>/dev/null; wait; exit 130" INT TERM
  wait $! || status=$?
  trap - INT TERM
  local outcome=passed
  if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
    outcome="FAILED (stopped after $limit s)"
  elif [ "$status" -ne 0 ]; then
    outcome="FAILED (exit $status)"
  fi
  [ "$outcome" = passed ] || stage_failures+=("$name")
  stage_lines+=("$(printf '%5d s  %-34s %s' $((SECONDS - start)) "$name" "$outcome")")
  echo "=== $name: $outcome, $((SECONDS - start)) s"
}

report() {
  echo
  echo "$1: what ran"
  printf '  %s\n' "${stage_lines[@]}"
  if [ ${#stage_failures[@]} -gt 0 ]; then
    local list
    list=$(printf '%s, ' "${stage_failures[@]}")
    echo "$1: FAILED: ${list%, }"
    return 1
  fi
  echo "$1: all passed"
}
