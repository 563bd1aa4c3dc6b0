"""What a training run needs around its losses: optimizers, checkpoints, logs, state, sharding."""
