# Sourced by the scripts that run several stages and report on each.
#   stage NAME SECONDS COMMAND...    runs it, at most that long, and notes how it went
#   beside NAME SECONDS COMMAND...   starts it; what it says comes with `join`
#   join                             waits for those started beside
#   report NAME                      prints all stages; returns 1 if one failed
# Stages of a stage, where its command uses this file, stand below it in the report.
stage_lines=()
stage_failures=()
beside_pids=()
parent_folder=${STAGES_FOLDER:-}
export STAGES_FOLDER
STAGES_FOLDER=$(mktemp -d)
trap 'rm -rf "$STAGES_FOLDER"' EXIT

stage() {
  local name=$1 limit=$2 start=$SECONDS status=0 outcome=passed
  shift 2
  echo "=== $name: $*"
  # `timeout` ends the whole process group of the command, and so does Ctrl-C: a
  # stage leaves nothing behind.
  timeout --kill-after=30 "$limit" "$@" &
  trap "kill $! ${beside_pids[*]} 2>/dev/null; wait; exit 130" INT TERM
  wait $! || status=$?
  trap - INT TERM
  local seconds=$((SECONDS - start))
  case $status in
    0) ;;
    124 | 137) outcome="FAILED (stopped after $limit s)" ;;
    *) outcome="FAILED (exit $status)" ;;
  esac
  [ "$status" -eq 0 ] || stage_failures+=("$name")
  stage_lines+=("$(printf '%3d.%d min  %-32s %s' \
    $((seconds / 60)) $((seconds % 60 / 6)) "$name" "$outcome")")
  if [ -e "$STAGES_FOLDER/report" ]; then
    mapfile -t -O "${#stage_lines[@]}" stage_lines <"$STAGES_FOLDER/report"
    rm "$STAGES_FOLDER/report"
  fi
  echo "=== $name: $outcome, $seconds s"
}

beside() {
  local out=$STAGES_FOLDER/beside${#beside_pids[@]}
  (
    stage_lines=()
    stage "$@"
    echo "${stage_lines[0]}" >"$out.line"
    exit ${#stage_failures[@]}
  ) >"$out" 2>&1 &
  beside_pids+=($!)
}

join() {
  local i out
  for i in "${!beside_pids[@]}"; do
    out=$STAGES_FOLDER/beside$i
    wait "${beside_pids[i]}" || stage_failures+=('beside the others')
    cat "$out"
    stage_lines+=("$(cat "$out.line")")
  done
}

report() {
  echo
  echo "$1: what ran"
  printf '  %s\n' "${stage_lines[@]}"
  [ -z "$parent_folder" ] || printf '    %s\n' "${stage_lines[@]}" >"$parent_folder/report"
  if [ ${#stage_failures[@]} -gt 0 ]; then
    local list
    list=$(printf '%s, ' "${stage_failures[@]}")
    echo "$1: FAILED: ${list%, }"
    return 1
  fi
  echo "$1: all passed"
}
