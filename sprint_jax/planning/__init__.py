"""Plans of runs: memory, FLOPs, transfers and least time, from compiled programs that never run."""
