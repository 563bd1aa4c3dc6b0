"""The embedded world: scenes of handwriting, their captions, stand-in encoders, and a judge that reads pictures back."""
