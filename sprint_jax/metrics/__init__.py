"""Numbers about pictures of any model."""
