"""SANA-Sprint in JAX: train, distill and sample one-step text-to-image models."""

import importlib
from typing import Any

__version__ = "0.1.0"

__all__ = ["SprintPipeline", "__version__", "trigflow"]


def __getattr__(name: str) -> Any:
    """Imports the API on its first use: commands parse their flags before anything heavy is loaded."""
    if name == "SprintPipeline":
        return importlib.import_module(".pipeline", __name__).SprintPipeline
    if name == "trigflow":
        return importlib.import_module(".trigflow", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
