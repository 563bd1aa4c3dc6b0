"""Data: worlds, sources and the loader."""
