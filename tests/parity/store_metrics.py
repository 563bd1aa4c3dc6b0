"""Stores what pytorch-fid, clean-fid, torch-fidelity and torchvision make of the tests' pictures and weights.

These packages need torchvision, whose wheels on PyPI are built for CUDA; beside a torch for CPUs alone they
keep transformers from being imported. They are therefore no part of an extra. In an environment of their own:

    pip install torch==2.13.0 torchvision==0.28.0 pytorch-fid==0.3.0 clean-fid==0.1.35 torch-fidelity==0.4.0 \
        "scipy<1.18" -e .
    PYTHONPATH=tests python tests/parity/store_metrics.py
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from helpers.metric_pictures import make_pictures, random_tensors, two_sets, write_pictures
from safetensors.numpy import save_file

# torchvision imports without its compiled operators if their names are known; nothing here calls them.
_known = [torch.library.Library("torchvision", "FRAGMENT") for _ in range(2)]
for _library, _name in zip(_known, ("nms", "qnms"), strict=True):
    _library.define(f"{_name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")

import torchvision.transforms as T  # noqa: E402
from cleanfid import fid as clean_fid  # noqa: E402
from cleanfid.resize import build_resizer  # noqa: E402
from cleanfid.utils import ResizeDataset  # noqa: E402
from PIL import Image  # noqa: E402
from pytorch_fid import fid_score  # noqa: E402
from pytorch_fid import inception as pytorch_inception  # noqa: E402
from torch_fidelity import calculate_metrics  # noqa: E402
from torch_fidelity import interpolate_compat_tensorflow as tensorflow1  # noqa: E402
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: E402
from torch_fidelity.metric_isc import isc_features_to_metric  # noqa: E402

from sprint_jax.metrics.inception import inception_table  # noqa: E402

PLACES = 12  # numbers of each resized picture that are kept
Y, X = np.random.default_rng(9).integers(0, 224, (2, PLACES))


def resizes() -> dict[str, np.ndarray]:
    """A few numbers, and the mean, of 200 pictures as each library resizes them."""
    to_512 = T.Compose([T.Resize(512), T.CenterCrop(512), T.ToTensor()])
    bicubic = T.InterpolationMode.BICUBIC
    to_clip = T.Compose([T.Resize(224, bicubic), T.CenterCrop(224), T.ToTensor()])
    to_dino = T.Compose([T.Resize((224, 224), bicubic), T.ToTensor()])
    clean = build_resizer("clean")

    def last(x, size=299):
        how = dict(size=(size, size), mode="bilinear", align_corners=False)
        return torch.nn.functional.interpolate(x[None], **how)[0]

    def fidelity(x):
        x = torch.tensor(x).permute(2, 0, 1)[None].float()
        return tensorflow1.interpolate_bilinear_2d_like_tensorflow1x(
            x, size=(299, 299), align_corners=False
        )[0]

    ways = {
        "sana": lambda x: 255 * last(to_512(Image.fromarray(x))),
        "pytorch-fid": lambda x: 255 * last(T.ToTensor()(x)),
        "clean-fid": lambda x: torch.tensor(clean(x)).permute(2, 0, 1),
        "torch-fidelity": fidelity,
        "clip": lambda x: 255 * to_clip(Image.fromarray(x)),
        "dinov2": lambda x: 255 * to_dino(Image.fromarray(x)),
    }
    pictures = make_pictures(200, seed=1)
    found = {}
    for name, way in ways.items():
        rows = []
        for number, picture in enumerate(pictures):
            x = way(picture).numpy()
            rows.append([*x[number % 3, Y, X], x.mean(dtype=np.float64)])
        found[f"resize/{name}"] = np.float32(rows)
    return found


def inception() -> dict[str, np.ndarray]:
    """Features of two pictures in pytorch-fid's network and in torch-fidelity's."""
    tensors = {
        name: torch.tensor(value)
        for name, value in random_tensors(
            {name: entry.shape for name, entry in inception_table().items()}
        ).items()
    }
    load = torch.nn.Module.load_state_dict
    # Counters of training are not among the random tensors.
    torch.nn.Module.load_state_dict = lambda self, state, **_: load(self, state, strict=False)
    pytorch_inception.load_state_dict_from_url = lambda *_, **__: tensors
    network = pytorch_inception.InceptionV3([0, 1, 2, 3]).eval()
    first = np.random.default_rng(2).uniform(0, 1, (2, 299, 299, 3)).astype(np.float32)
    pools = network(torch.tensor(first).permute(0, 3, 1, 2))
    found = {f"pytorch-fid/{pool.shape[1]}": pool.mean((2, 3)).numpy() for pool in pools}
    path = Path(tempfile.mkdtemp()) / "weights.pth"
    torch.save(tensors, path)
    names = ["64", "2048", "logits_unbiased", "logits"]
    extractor = FeatureExtractorInceptionV3("x", names, feature_extractor_weights_path=str(path))
    second = np.stack([x[:40, :50] for x in make_pictures(2, seed=3, low=60)])
    features = extractor(torch.tensor(second).permute(0, 3, 1, 2))
    for name, value in zip(names, features, strict=True):
        found[f"torch-fidelity/{name}"] = value.numpy()
    return found | numbers(path)


def numbers(weights: Path) -> dict[str, np.ndarray]:
    """FID, KID, precision and recall of two folders by 64 features; the Inception score of logits."""
    root = Path(tempfile.mkdtemp())
    folders = [
        write_pictures(root / name, pictures)
        for name, pictures in zip(("fake", "real"), two_sets(), strict=True)
    ]
    network = pytorch_inception.InceptionV3([0]).eval()
    how = network, 16, 64, "cpu", 0
    stats = [fid_score.compute_statistics_of_path(str(folder), *how) for folder in folders]
    found = {"number/pytorch-fid/fid": fid_score.calculate_frechet_distance(*stats[0], *stats[1])}
    clean, kept = [], {}
    for folder in folders:
        files = sorted(str(path) for path in folder.iterdir())
        values = fid_score.get_activations(files, *how)
        kept[f"features/pytorch-fid/{folder.name}"] = values.astype(np.float32)
        pictures = torch.stack([x for x in ResizeDataset(files, mode="clean")])
        # As clean-fid's default network scales them.
        x = (pictures - 128) / 128
        clean.append(network.blocks[0](x).mean((2, 3)).numpy())
        kept[f"features/clean-fid/{folder.name}"] = clean[-1]
    both = [(x.mean(0), np.cov(x, rowvar=False)) for x in clean]
    found["number/clean-fid/fid"] = clean_fid.frechet_distance(*both[0], *both[1])
    found["number/clean-fid/kid"] = clean_fid.kernel_distance(*clean, num_subsets=1)
    layers = {f"feature_layer_{name}": "64" for name in ("fid", "kid", "prc")}
    result = calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        cuda=False,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=50,
        kid_subsets=20,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        verbose=False,
        cache=False,
        save_cpu_ram=True,
        **layers,
    )
    short = dict(frechet_inception_distance="fid", precision="precision", recall="recall")
    short |= dict(kernel_inception_distance_mean="kid", kernel_inception_distance_std="kid std")
    for name, ours in short.items():
        found[f"number/torch-fidelity/{ours}"] = result[name]
    logits = torch.tensor(np.random.default_rng(6).normal(0, 3, (97, 20)))
    score = isc_features_to_metric(logits)
    found["number/torch-fidelity/score"] = score["inception_score_mean"]
    found["number/torch-fidelity/score std"] = score["inception_score_std"]
    return kept | {name: np.float64(value) for name, value in found.items()}


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    arrays = resizes() | inception()
    arrays = {name: np.atleast_1d(np.ascontiguousarray(value)) for name, value in arrays.items()}
    folder = Path(__file__).parent / "stored" / "metrics"
    folder.mkdir(exist_ok=True)
    save_file(arrays, folder / "arrays.safetensors")
    print(*(f"{name} {value[0]}" for name, value in arrays.items() if "number" in name), sep="\n")
