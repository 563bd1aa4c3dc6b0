"""Stores a tiny AutoencoderDC of diffusers and what it computes, for the tests that have no torch.

python tests/parity/store_dc_ae.py
"""

from pathlib import Path

import numpy as np
import torch
from helpers.reference import channels_first, channels_last, tiny_dc_ae
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent / "stored" / "dc_ae"


def main() -> None:
    model = tiny_dc_ae()
    model.save_pretrained(FOLDER)
    random = np.random.default_rng(0)
    pixels = random.uniform(-1, 1, (2, 24, 32, 3)).astype(np.float32)
    latents = random.normal(size=(2, 6, 8, 4)).astype(np.float32)
    with torch.no_grad():
        arrays = dict(
            pixels=pixels,
            encoded=channels_last(model.encode(channels_first(pixels)).latent),
            latents=latents,
            decoded=channels_last(model.decode(channels_first(latents)).sample),
        )
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(arrays, FOLDER / "arrays.safetensors")


if __name__ == "__main__":
    main()
