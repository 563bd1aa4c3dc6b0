#!/usr/bin/env bash
# Runs the test suite, or the part that the arguments name:
#   launch/test.sh [tests/core/test_config.py] [-k words] [any other pytest argument]
#   launch/test.sh --parity [...]    installs torch and diffusers too and compares with them
#   launch/test.sh --all [...]       with the slowest tests, which take some five minutes of two cores more
# Needs no network once .venv is there, no accelerator and no downloads.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/_env.sh
extras=dev
chosen=(-m "not slow")
while [ $# -gt 0 ]; do
  case "$1" in
    --parity) extras=dev,parity ;;
    --all) chosen=() ;;
    *) break ;;
  esac
  shift
done
environment "$extras"

# One file stays on one worker, so that what a file trains once is shared by its tests; files come in the
# order of tests/conftest.py, where xdist would begin with those of many tests.
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile \
  --no-loadscope-reorder "${chosen[@]}" "$@"
