"""The cost of a run: memory, FLOPs, transfers and time, from compiled programs that never run."""
