"""Parity with torch libraries; collected only where those are installed (launch/test.sh --parity)."""

import importlib.util
import warnings
from pathlib import Path

import pytest

if importlib.util.find_spec("diffusers") and importlib.util.find_spec("torch"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers  # noqa: F401
        import torch

        torch.set_num_threads(1)
    collect_ignore = [] if importlib.util.find_spec("cv2") else ["test_conditions.py"]
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items):
    # These libraries warn about one another; ours must not (pyproject.toml).
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
