"""Whole pipelines on disk: workdirs, diffusers folders, StableHLO."""
