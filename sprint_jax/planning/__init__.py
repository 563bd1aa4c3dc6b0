"""What a run will cost: memory, FLOPs, transfers and time, from compiled programs that never run."""
