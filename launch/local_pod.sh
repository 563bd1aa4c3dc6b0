#!/usr/bin/env bash
# A pod on one machine, for tests and teaching: N processes with M virtual CPU devices each.
#   launch/local_pod.sh 2 --devices 4 -- .venv/bin/python -m sprint_jax.train \
#     --config configs/digits.py:teacher,small --workdir runs/pod --distributed
# Lines begin with the number of their process. Ctrl-C and SIGTERM go to all of them; the exit code is
# that of the first process, by number, that failed. --port P fixes the coordinator's port, --dry_run
# prints the commands.
set -euo pipefail
# shellcheck source=launch/_pod.sh
source "$(dirname "$0")/_pod.sh"
count="${1:-}"
[[ "$count" =~ ^[1-9][0-9]*$ ]] || usage_error "the first argument must be the number of processes"
devices=1 port=$((20000 + RANDOM % 10000))
read_flags "devices port" "${@:2}"
[ "$devices" -gt 0 ] || usage_error "--devices $devices must be a number above 0"

# Virtual devices stand in for chips. With fewer cores than devices they may have to wait for one
# another for longer than XLA's 40 seconds.
flags="--xla_force_host_platform_device_count=$devices\
 --xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600"
variables=(JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }$flags"
  "JAX_COORDINATOR_ADDRESS=localhost:$port" "JAX_NUM_PROCESSES=$count")

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < count; i++)); do
  command=(env "${variables[@]}" "JAX_PROCESS_ID=$i" "${words[@]}")
  if [ -n "$dry_run" ]; then
    show_or_run "${command[@]}"
  else
    "${command[@]}" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
    pids+=($!)
  fi
done

failed=0
for pid in "${pids[@]}"; do
  # wait returns early when a trapped signal came; then the child is still there.
  while true; do
    wait "$pid" && code=0 || code=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  [ "$failed" != 0 ] || failed="$code"
done
exit "$failed"
