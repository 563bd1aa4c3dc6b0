"""The embedded world: scenes of handwriting, captions, stand-in encoders, a judge that reads pictures back."""
