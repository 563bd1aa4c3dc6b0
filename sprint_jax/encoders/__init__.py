"""The frozen encoders: pixels to latents and back, captions to features, and their identity."""
