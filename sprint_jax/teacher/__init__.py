"""From a published or trained network to a teacher that can be distilled, and the check of it."""
