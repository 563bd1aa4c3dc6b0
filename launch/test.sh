#!/usr/bin/env bash
# Runs the tests: by default those that take about five minutes of two cores together.
#   launch/test.sh [--faults] [--all] [--parity] [pytest arguments]
#     --faults   adds tests/faults: processes, disks, kills
#     --all      adds them, and the slowest tests
#     --parity   adds tests/parity: comparisons with torch libraries, which it installs
#   launch/test.sh tests/core/test_config.py [pytest arguments]    runs what is named
# Needs no network once .venv is there, no accelerator and no downloads.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/_env.sh
extras=dev
slow=" or slow" faults=" or faults" parity=" or parity" # marks of tests that are left out
while [ $# -gt 0 ]; do
  case "$1" in
    --faults) faults="" ;;
    --all) slow="" faults="" ;;
    --parity) parity="" extras=dev,parity ;;
    *) break ;;
  esac
  shift
done
left_out="$slow$faults$parity"
case " $* " in *" tests/"*) left_out="" ;; esac
environment "$extras"

# One file stays on one worker, so that what a file trains once is shared by its tests; files come in the
# order of tests/conftest.py, where xdist would begin with those of many tests.
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile \
  --no-loadscope-reorder ${left_out:+-m "not (${left_out# or })"} "$@"
