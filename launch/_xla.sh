# shellcheck shell=bash disable=SC2034  # for the scripts that source this
# Flags of XLA's compilers for a training, each with its reason and source, for the scripts that start one. XLA ends a
# process at a flag that it does not know, so here are only such as jaxlib 0.10, 0.11 and 0.12 have. Inference sets
# its options by itself. None was measured here on a GPU or TPU; benchmarks/gpu.sh tries options on one GPU.

gpu_flags=(
  # Collectives of FSDP run under computation; without it they wait in line.
  # docs.nvidia.com/jax-toolbox/environment-variables, docs.jax.dev/en/latest/gpu_performance_tips.html
  --xla_gpu_enable_latency_hiding_scheduler=true
  # One collective of up to 128 MB for many small ones, which cost latency each: a block's weights are 42 MB (0.6B)
  # or 161 MB (1.6B) in bfloat16. MaxText's configs/gpu/a3/llama_2_7b/1vm.sh, for 8 H100, has the first.
  --xla_gpu_all_gather_combine_threshold_bytes=134217728
  --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
  # Command buffers (CUDA graphs) and Triton's products stay as XLA has them: MaxText's 1vm.sh turns both off for
  # networks of billions, but kernels of small ones take less time than their launch.
)
tpu_flags=(
  # Gathers of FSDP's parameters run inside the fusions that compute meanwhile.
  # MaxText's benchmarks/xla_flags_library.py, "CF_FOR_ALL_GATHER"
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
)
