#!/usr/bin/env bash
# Starts a command again when it crashed: from its last checkpoint, as the same line always does.
#   launch/supervise.sh --max_restarts 10 -- .venv/bin/python -m sprint_jax.train ...
# It is not started again after success (0), wrong usage (2), too many updates that were not finite
# (3), too little memory (4), Ctrl-C (130) or SIGTERM (143): that would end in the same way, or is what
# somebody asked for.
# A pause of --backoff seconds (5) doubles with every restart, up to 5 minutes; a run of an hour
# starts the count anew. SIGTERM is passed on, and then nothing is started again.
set -euo pipefail
# shellcheck source=launch/_pod.sh
source "$(dirname "$0")/_pod.sh"
max_restarts=10 backoff=5
read_flags "max_restarts backoff" "$@"
if [ -n "$dry_run" ]; then
  show_or_run "${words[@]}"
  exit
fi

child='' stopping=''
stop() {
  stopping=1
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM INT

restarts=0
while true; do
  begun=$SECONDS code=0
  "${words[@]}" &
  child=$!
  # wait returns early when a trapped signal came; then the child is still there.
  while true; do
    wait "$child" && code=0 || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  case "$code" in 0 | 2 | 3 | 4 | 130 | 143) exit "$code" ;; esac
  [ -z "$stopping" ] || exit "$code"
  [ $((SECONDS - begun)) -lt 3600 ] || restarts=0
  if [ "$restarts" -ge "$max_restarts" ]; then
    echo "supervise: ended with $code after $restarts restarts: giving up" >&2
    exit "$code"
  fi
  pause=$((backoff << restarts))
  [ "$restarts" -lt 6 ] && [ "$pause" -lt 300 ] || pause=300
  restarts=$((restarts + 1))
  echo "supervise: ended with $code, restart $restarts of $max_restarts in $pause s" >&2
  sleep "$pause" &
  child=$!
  wait "$child" || exit 143
done
