"""Numbers about pictures, whoever drew them."""
