"""Stores two tiny SanaTransformer2DModels of diffusers and what they compute, for the tests that have
no torch.

python tests/parity/store_sana.py
"""

from pathlib import Path

import numpy as np
from helpers.reference import sana_inputs, sana_velocity, tiny_sana
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent / "stored" / "sana"
WIDTH = dict(
    num_attention_heads=3,
    attention_head_dim=4,
    num_cross_attention_heads=2,
    cross_attention_head_dim=6,
    cross_attention_dim=12,
    num_layers=2,
)
MODELS = {
    "student": dict(guidance_embeds=True, out_channels=6),
    "teacher": dict(patch_size=2, interpolation_scale=2.0, num_layers=1),
}


def main() -> None:
    for name, changes in MODELS.items():
        model = tiny_sana(**(WIDTH | changes))
        model.save_pretrained(FOLDER / name)
        inputs = sana_inputs(model.config, (4, 6))
        arrays = dict(zip(("x", "t", "text", "mask", "guidance"), inputs, strict=True))
        arrays["velocity"] = sana_velocity(model, *inputs)
        arrays = {key: np.ascontiguousarray(a) for key, a in arrays.items() if a is not None}
        save_file(arrays, FOLDER / name / "arrays.safetensors")


if __name__ == "__main__":
    main()
