"""Batches of any source as a function of (seed, i)."""
