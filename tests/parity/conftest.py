"""Parity with torch libraries; collected only where those are installed (launch/test.sh --parity)."""

import importlib.util
import warnings

if importlib.util.find_spec("diffusers") and importlib.util.find_spec("torch"):
    with warnings.catch_warnings():
        # Their imports warn about one another; ours must not (pyproject.toml).
        warnings.simplefilter("ignore")
        import diffusers  # noqa: F401
        import torch

        torch.set_num_threads(1)
else:
    collect_ignore_glob = ["test_*.py"]
