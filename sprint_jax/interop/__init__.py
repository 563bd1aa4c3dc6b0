"""Weights to and from other libraries: name tables, and the folders that diffusers reads and writes."""
