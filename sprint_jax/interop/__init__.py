"""Other libraries' weights: one total name table for each network, both directions."""
