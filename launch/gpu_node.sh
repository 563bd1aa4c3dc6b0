#!/usr/bin/env bash
# Trains on all GPUs of this machine: one process drives them, so nothing has to be connected.
#   launch/gpu_node.sh -- --config configs/digits.py:teacher --workdir runs/teacher --config.mesh.fsdp=8
#   --backend cuda (CUDA 13; cpu tries the recipe without a GPU), --max_restarts 10, --dry_run
# The words after -- go to sprint_jax.train. What is restarted: see launch/supervise.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/_pod.sh
source launch/_pod.sh
# shellcheck source=launch/_env.sh
source launch/_env.sh
backend=cuda max_restarts=10
read_flags "backend max_restarts" "$@"
use_backend "$backend"

if [ -z "$dry_run" ]; then
  environment "$extras"
else
  echo "environment '$extras'; JAX_PLATFORMS=$JAX_PLATFORMS XLA_FLAGS='$XLA_FLAGS'"
fi
show_or_run launch/supervise.sh --max_restarts "$max_restarts" -- \
  .venv/bin/python -m sprint_jax.train "${words[@]}"
