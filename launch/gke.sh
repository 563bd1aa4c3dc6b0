#!/usr/bin/env bash
# Trains on Kubernetes (GKE with the JobSet controller): one pod per host, named by its index.
#   launch/gke.sh --name run1 --image IMAGE --hosts 4 --topology 4x4 --accelerator tpu-v5-lite-podslice \
#     -- --config configs/digits.py:teacher --workdir DIR
#   --backend tpu|cuda, --chips 4 (per host), --max_restarts 10, --dry_run (prints the manifest)
# IMAGE: the checkout in its working directory, with .venv made by launch/_env.sh (extra tpu or cuda, and gcs or s3).
# DIR: gs://BUCKET/run (extra gcs), or a volume that all pods share; add that to what --dry_run prints.
set -euo pipefail
# shellcheck source=launch/_pod.sh
source "$(dirname "$0")/_pod.sh"
name='' image='' hosts=1 topology='' accelerator='' chips=4 backend=tpu max_restarts=10
read_flags "name image hosts topology accelerator chips backend max_restarts" "$@"
if [ -z "$name" ] || [ -z "$image" ] || [ -z "$accelerator" ]; then
  usage_error "--name, --image and --accelerator are needed"
fi
[ "$hosts" -gt 0 ] && [ "$chips" -gt 0 ] || usage_error "--hosts $hosts, --chips $chips: one or more"
use_backend "$backend"
resource=google.com/tpu node="cloud.google.com/gke-tpu-accelerator: $accelerator"
[ "$backend" != cuda ] || resource=nvidia.com/gpu node="cloud.google.com/gke-accelerator: $accelerator"
[ -z "$topology" ] || node="$node, cloud.google.com/gke-tpu-topology: $topology"
arguments="$(printf ', "%s"' "${words[@]//\"/\\\"}" --distributed)"

# The JobSet's name is also that of its service, in which pod 0 is NAME-host-0-0. A pod's process
# restarts in place (supervise.sh); a lost node restarts the whole set, which goes on as well.
manifest="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata: {name: $name}
spec:
  failurePolicy: {maxRestarts: $max_restarts}
  replicatedJobs:
  - name: host
    replicas: 1
    template:
      spec:
        {parallelism: $hosts, completions: $hosts, completionMode: Indexed, backoffLimit: 0, template: {spec: {
          restartPolicy: Never, terminationGracePeriodSeconds: 180, nodeSelector: {$node},
          containers: [{name: train, image: \"$image\", resources: {limits: {$resource: $chips}},
            env: [{name: JAX_PLATFORMS, value: \"$JAX_PLATFORMS\"}, {name: XLA_FLAGS, value: \"$XLA_FLAGS\"},
              {name: LIBTPU_INIT_ARGS, value: \"${LIBTPU_INIT_ARGS:-}\"},
              {name: JAX_NUM_PROCESSES, value: \"$hosts\"},
              {name: JAX_COORDINATOR_ADDRESS, value: \"$name-host-0-0.$name:8476\"}],
            command: [\"bash\", \"-c\", \"JAX_PROCESS_ID=\$JOB_COMPLETION_INDEX exec \\\"\$@\\\"\", \"pod\",
              \"launch/supervise.sh\", \"--max_restarts\", \"$max_restarts\", \"--\",
              \".venv/bin/python\", \"-m\", \"sprint_jax.train\"$arguments]}]}}}
"
if [ -n "$dry_run" ]; then
  echo "$manifest"
else
  kubectl apply -f - <<<"$manifest"
fi
