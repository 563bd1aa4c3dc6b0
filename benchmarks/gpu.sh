#!/usr/bin/env bash
# Measures a machine with an NVIDIA GPU, without a network, the most important first, for at most ten minutes: see
# benchmarks/gpu.py. The same line goes on where an earlier one was cut off.
#   bash benchmarks/gpu.sh                      adds to benchmarks/results/gpu.jsonl
#   bash benchmarks/gpu.sh --tiny --out FILE    tries the script on CPU, with sizes that say nothing
#   --seconds 600, --wheels .wheels, --scratch DIR, --only "ceilings,600m x 1", --again, --alone
# The machine has Python 3.12 or newer with JAX 0.11 or newer for CUDA, torch and transformers; PYTHON=path
# names its interpreter. What else is missing comes from the folder that benchmarks/wheels.sh filled.
set -euo pipefail
cd "$(dirname "$0")/.."
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
