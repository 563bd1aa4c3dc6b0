"""From a published or trained network to a teacher that can be distilled, and the verdict on it."""
