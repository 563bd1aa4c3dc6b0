"""Pictures per second of the metrics' networks, from JPEG files to features, beside pytorch-fid and open CLIP.

    python benchmarks/metrics.py

Both get the same files of 1024 pixels; arms take turns. Weights are random, and the same for both Inceptions,
whose features are compared first. Needs pytorch-fid and open_clip_torch. Prints JSON lines: times of all
pictures, those of others over ours, and the share of our time that decoding and resizing alone take.
"""

import argparse
import functools
import itertools
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sprint_jax.benchmarking.timing import header, paired_rounds, summarize
from sprint_jax.interop.files import Tensors, load_params
from sprint_jax.metrics import clip, features, inception, preprocess
from sprint_jax.metrics.pictures import open_pictures

SIDE, BATCH = 1024, 16


class Files(torch.utils.data.Dataset):
    """Pictures as open CLIP's own transform makes them."""

    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def write_pictures(folder: Path, count: int) -> list[str]:
    """Writes smooth noise as JPEG files; returns their paths."""
    folder.mkdir()
    random, paths = np.random.default_rng(0), []
    for number in range(count):
        small = Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8))
        paths.append(str(folder / f"{number:05d}.jpg"))
        small.resize((SIDE, SIDE), Image.BICUBIC).save(paths[-1], quality=75)
    return paths


def random_tensors(table: dict) -> dict[str, np.ndarray]:
    """Draws weights for Inception such that activations neither die nor explode."""
    random, tensors = np.random.default_rng(0), {}
    for name, entry in table.items():
        shape = entry.shape
        wide = random.normal(0, (2 / max(1, np.prod(shape[1:]))) ** 0.5, shape)
        tensors[name] = (wide if len(shape) > 1 else np.ones(shape)).astype(np.float32)
    return tensors


def make_inception() -> tuple[features.Network, torch.nn.Module]:
    """Ours and pytorch-fid's Inception, with the same random weights."""
    from pytorch_fid import inception as theirs

    table = inception.inception_table()
    tensors = random_tensors(table)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    params = load_params(table, Tensors("random", shapes, tensors.__getitem__), "float32")
    model = inception.Inception()
    # It would download weights.
    theirs.load_state_dict_from_url = lambda *_, **__: {
        name: torch.tensor(tensor) for name, tensor in tensors.items()
    }
    ours = features.make_network(
        "inception", lambda p, x: model.apply({"params": p}, x)["2048"], params, model
    )
    return ours, theirs.InceptionV3([3]).eval()


def make_clip(folder: Path) -> tuple[features.Network, torch.nn.Module, object]:
    """Ours and open CLIP's ViT-B/32, with the same random weights, and open CLIP's transform."""
    import open_clip
    from safetensors.torch import save_file

    theirs, _, transform = open_clip.create_model_and_transforms("ViT-B-32-quickgelu")
    folder.mkdir()
    save_file(
        {k: v.contiguous() for k, v in theirs.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    model, params = clip.load_clip(folder)

    def apply(params, x):
        return model.apply({"params": params}, x, method="image_features")

    return features.make_network("clip", apply, params, model), theirs.eval(), transform


def main(argv: list[str]) -> None:
    from pytorch_fid import fid_score

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args(argv)
    torch.set_grad_enabled(False)
    print(json.dumps(header("python benchmarks/metrics.py", torch=torch.__version__)), flush=True)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        paths = write_pictures(root / "pictures", flags.pictures)
        pictures, turns = open_pictures(root / "pictures"), itertools.count()
        (inceptions, fid), (clips, open_clip, transform) = (
            make_inception(),
            make_clip(root / "clip"),
        )
        workers = len(os.sched_getaffinity(0)) - 1

        def extract(network, view):
            inputs = features.view_pictures(pictures, view)
            return features.extract(network, inputs, root / str(next(turns)), batch=BATCH)[0]

        def decode(view):
            with ThreadPoolExecutor(8) as pool:
                list(
                    pool.map(
                        lambda i: preprocess.apply(view, pictures.read(i)), range(flags.pictures)
                    )
                )

        def open_clip_features():
            loader = torch.utils.data.DataLoader(
                Files(paths, transform), BATCH, num_workers=workers
            )
            return np.concatenate([open_clip.encode_image(batch).numpy() for batch in loader])

        views = {"inception": preprocess.INCEPTION_PYTORCH, "clip": preprocess.clip_view()}
        for what, network, package, their in (
            ("inception", inceptions, "pytorch-fid",
             lambda: fid_score.get_activations(paths, fid, BATCH, 2048, "cpu", workers)),
            ("clip", clips, "open_clip", open_clip_features),
        ):  # fmt: skip
            ours, expected = extract(network, views[what]), their()
            arms = {
                "sprint_jax": functools.partial(extract, network, views[what]),
                package: their,
                "decoding alone": functools.partial(decode, views[what]),
            }
            found = summarize(paired_rounds(arms, flags.rounds), "sprint_jax")
            line = {"network": what, "pictures": flags.pictures, "side": SIDE}
            line["error"] = float(np.abs(ours - expected).max() / np.abs(expected).max())
            line["per_second"] = {k: flags.pictures / ms[1] * 1e3 for k, ms in found["ms"].items()}
            print(json.dumps(line | found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
