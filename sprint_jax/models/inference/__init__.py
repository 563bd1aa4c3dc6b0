"""Inference forms of the networks: weights arranged once, fewer and larger operations."""
