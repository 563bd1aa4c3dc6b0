#!/usr/bin/env bash
# Trains on all hosts of a TPU slice (Cloud TPU VMs), started from your own machine.
#   launch/tpu_pod.sh --tpu NAME --zone ZONE -- --config configs/digits.py:teacher --workdir DIR
#   TPU_NAME and TPU_ZONE stand in for the first two, as for launch/sweep.py --backend pod
#   --dir sprint_jax (the checkout on every host), --backend tpu|cpu, --max_restarts 10, --dry_run
# Before: create the slice, and clone the repository on all hosts with the same ssh --worker=all.
# --workdir must be one place for all hosts: gs://BUCKET/run, with the extra gcs, or a disk such as Filestore.
# Addresses and numbers of the processes come from the TPU: jax.distributed asks it.
set -euo pipefail
# shellcheck source=launch/_pod.sh
source "$(dirname "$0")/_pod.sh"
tpu="${TPU_NAME:-}" zone="${TPU_ZONE:-}" dir=sprint_jax backend=tpu max_restarts=10
read_flags "tpu zone dir backend max_restarts" "$@"
if [ -z "$tpu" ] || [ -z "$zone" ]; then
  usage_error "--tpu and --zone are needed, or TPU_NAME and TPU_ZONE"
fi
use_backend "$backend"

# What runs on each host: the environment once, then the training under supervision.
printf -v train '%q ' launch/supervise.sh --max_restarts "$max_restarts" -- \
  .venv/bin/python -m sprint_jax.train "${words[@]}" --distributed
printf -v variables '%q ' "JAX_PLATFORMS=$JAX_PLATFORMS" "XLA_FLAGS=$XLA_FLAGS" \
  "LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS:-}"
printf -v there 'set -euo pipefail; cd %q; source launch/_env.sh; environment "%s"; export %s; exec %s' \
  "$dir" "$extras" "$variables" "$train"
show_or_run gcloud compute tpus tpu-vm ssh "$tpu" --zone "$zone" --worker=all \
  --command "bash -c $(printf %q "$there")"
