"""Other libraries' weights, read and written by one complete table of names for each network."""
