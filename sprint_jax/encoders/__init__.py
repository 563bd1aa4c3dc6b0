"""The frozen ends: pixels to latents and back, captions to features, and how they are identified."""
