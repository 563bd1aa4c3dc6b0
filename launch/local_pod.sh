#!/usr/bin/env bash
# A pod on one machine, for tests and teaching: N processes with M virtual CPU devices each.
#   launch/local_pod.sh 2 --devices 4 -- .venv/bin/python -m sprint_jax.train \
#     --config configs/digits.py:teacher,small --workdir runs/pod --distributed
# Lines begin with the number of their process. Ctrl-C and SIGTERM go to all of them; the exit code is
# that of the first process, by number, that failed. --dry_run prints the commands, --port P fixes
# the coordinator's port.
set -euo pipefail
# shellcheck source=launch/_pod.sh
source "$(dirname "$0")/_pod.sh"

devices=1 port='' dry_run=''
count="${1:-}"
[[ "$count" =~ ^[1-9][0-9]*$ ]] || usage_error "the first argument must be the number of processes"
shift
while [ $# -gt 0 ]; do
  case "$1" in
    --devices | --port)
      [ $# -gt 1 ] || usage_error "$1 needs a number"
      [ "$1" = --port ] && port="$2" || devices="$2"
      shift 2
      ;;
    --dry_run) dry_run=1 && shift ;;
    --) shift && break ;;
    *) usage_error "unknown flag $1; the command comes after --" ;;
  esac
done
[ $# -gt 0 ] || usage_error "no command after --"
[[ "$devices" =~ ^[1-9][0-9]*$ ]] || usage_error "--devices $devices must be a number above 0"

export JAX_PLATFORMS=cpu JAX_NUM_PROCESSES="$count"
# Virtual devices stand in for chips; on fewer cores than devices they may wait for one another for
# longer than XLA's 40 seconds.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices\
 --xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600"
export JAX_COORDINATOR_ADDRESS="localhost:${port:-$((20000 + RANDOM % 10000))}"

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < count; i++)); do
  if [ -n "$dry_run" ]; then
    echo "JAX_PLATFORMS=cpu XLA_FLAGS='${XLA_FLAGS# }' JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS" \
      "JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$i $(quoted "$@")"
    continue
  fi
  JAX_PROCESS_ID=$i "$@" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
  pids+=($!)
done

failed=0
for pid in "${pids[@]}"; do
  await "$pid" && code=0 || code=$?
  [ "$failed" != 0 ] || failed="$code"
done
exit "$failed"
