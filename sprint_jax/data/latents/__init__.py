"""Encoded records on disk: what `encode` writes and training reads."""
