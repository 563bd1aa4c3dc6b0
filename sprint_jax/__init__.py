"""SANA-Sprint in JAX: train, distill and sample one-step text-to-image models."""

from . import trigflow
from .pipeline import SprintPipeline

__version__ = "0.1.0"

__all__ = ["SprintPipeline", "__version__", "trigflow"]
