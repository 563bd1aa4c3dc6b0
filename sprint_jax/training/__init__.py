"""One run: stages, updates, state, optimizer, log."""
