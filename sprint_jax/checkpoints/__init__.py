"""A run's folder: what is saved, what is in it, and where weights lie."""
