"""The losses of SANA-Sprint (arXiv 2503.09641), one file each, as pure functions of arrays and callables.

Networks come in as callables that already hold their text and guidance: ``F(x, t)`` is a TrigFlow
network of ``x = x_t / sigma_d`` [B, h, w, C] and the angle ``t`` [B] (see `trigflow.to_trigflow`).
All losses are float32 and return per-sample values beside the mean, for the diagnostics.
"""

from .dmd import dmd_loss, fake_score_loss
from .flow import flow_matching_loss
from .ladd import ladd_discriminator_loss, ladd_generator_loss
from .meanflow import meanflow_loss
from .per_sample import per_sample_mean, per_sample_norm
from .scm import scm_loss
from .trajectory import trajectory_loss
from .twinflow import rectify_loss, twin_flow_loss

__all__ = [
    "dmd_loss",
    "fake_score_loss",
    "flow_matching_loss",
    "ladd_discriminator_loss",
    "ladd_generator_loss",
    "meanflow_loss",
    "per_sample_mean",
    "per_sample_norm",
    "rectify_loss",
    "scm_loss",
    "trajectory_loss",
    "twin_flow_loss",
]
