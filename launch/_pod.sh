# shellcheck shell=bash
# Sourced by the scripts that start processes:
#
#   usage_error WORDS    one line, exit code 2
#   quoted WORD...       words as they would be typed
#   await PID            the exit code of a child, however often a trap interrupts the wait

usage_error() {
  echo "error: $* (see the head of $0)" >&2
  exit 2
}

quoted() {
  local words
  printf -v words '%q ' "$@"
  echo "${words% }"
}

await() {
  local code=0
  while true; do
    wait "$1" && code=0 || code=$?
    # wait also returns when a trapped signal came; then the child is still there.
    kill -0 "$1" 2>/dev/null || return "$code"
  done
}
