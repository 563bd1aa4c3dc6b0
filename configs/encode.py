"""Images and captions to latents and text features, once for all trainings.

    python -m sprint_jax.encode --config configs/encode.py:1024 --config.data.images=DIR,PACK.tar \
        --config.data.encoders=Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers --out LATENTS
    python -m sprint_jax.encode --config configs/encode.py:digits --out LATENTS

Words: the resolution of published models, 512, 1024, 2048 or 4096, or ``digits`` for the digits world with its
own encoders. A 1024-pixel image takes 64 kB, and each of its captions 4.6 kB for a token, at most
1.4 MB; encoding it takes 5.2 TFLOP, and a caption at most 1.2 TFLOP. ``--limit 100`` is a trial.
The digits took some 1,200 records/s on two busy CPU cores.
"""

from configs import default
from sprint_jax.core.config import parse_arg


def get_config(arg=None):
    (what,) = parse_arg(arg, ("1024", "512", "2048", "4096", "digits"))
    c = default.get_config()
    c.data.source = "images"
    if what == "digits":
        c.data.images = ("tfds:digits/full:train",)
        c.data.sizes = ("8x16",)  # the world's pictures as they are
        c.encode.dtype = "float32"
        c.encode.batch_size = 64
    else:
        c.data.resolution = int(what)
    return c
