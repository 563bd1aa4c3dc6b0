"""Resizes and numbers of metrics against torchmetrics, prdc, and stored ones of the FID packages."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from helpers.metric_pictures import make_pictures, random_tensors, two_sets
from safetensors.numpy import load_file

from sprint_jax.interop.files import Tensors, load_params
from sprint_jax.metrics import clip_score, diversity, frechet, inception, kernel, preprocess
from sprint_jax.metrics.prdc import prdc

STORED = Path(__file__).parent / "stored" / "metrics" / "arrays.safetensors"
# Where each picture is looked at, as in store_metrics.py.
Y, X = np.random.default_rng(9).integers(0, 224, (2, 12))
VIEWS = {
    "sana": preprocess.INCEPTION_SANA,
    "pytorch-fid": preprocess.INCEPTION_PYTORCH,
    "clean-fid": preprocess.INCEPTION_CLEAN,
    "torch-fidelity": preprocess.INCEPTION_FIDELITY,
    "clip": preprocess.clip_view(),
    "dinov2": preprocess.DINOV2,
}


@pytest.fixture(scope="module")
def stored():
    return load_file(STORED)


@pytest.fixture(scope="module")
def pictures():
    return make_pictures(200, seed=1)


@pytest.mark.parametrize("name", VIEWS)
def test_resizes_are_those_of_the_libraries(name, stored, pictures):
    view, want = VIEWS[name]._replace(mean=(0.0,), std=(1.0,)), stored[f"resize/{name}"]
    for number, (picture, row) in enumerate(zip(pictures, want, strict=True)):
        x = preprocess.apply(view, picture)
        ours = [*x[Y, X, number % 3], x.mean(dtype=np.float64)]
        # Bytes agree to the last; floats to 1e-5 of their range.
        assert np.abs(ours - row).max() < 255e-5, (number, picture.shape)


@pytest.fixture(scope="module")
def features(stored):
    """64 features of both sets: from the packages, and by the shallow part of a random Inception of ours."""
    table = inception.inception_table()
    shapes = {name: entry.shape for name, entry in table.items()}
    params = load_params(table, Tensors("", shapes, random_tensors(shapes).__getitem__), "float32")
    run = jax.jit(lambda params, x: inception.Inception().apply({"params": params}, x)["64"])
    found = {
        name: [stored[f"features/{name}/{part}"] for part in ("fake", "real")]
        for name in ("pytorch-fid", "clean-fid")
    }
    sets = [
        np.stack([preprocess.apply(VIEWS["torch-fidelity"], x) for x in each])
        for each in two_sets()
    ]
    ours = [np.concatenate([run(params, part) for part in np.split(x, 3)]) for x in sets]
    return found | {"torch-fidelity": ours}


def test_whole_numbers_are_those_of_the_packages(stored, features):
    def want(name):
        return pytest.approx(stored[f"number/{name}"][0], rel=1e-3)

    for name, (fake, real) in features.items():
        assert frechet.frechet(fake, real) == want(f"{name}/fid"), name
    assert kernel.kid(*features["clean-fid"], subsets=1).value == want("clean-fid/kid")
    fake, real = features["torch-fidelity"]
    found = kernel.kid(fake, real, subsets=20, size=50)
    assert found.mean == want("torch-fidelity/kid")
    assert found.std == want("torch-fidelity/kid std")
    found = prdc(real, fake, neighbours=3)
    for name in ("precision", "recall"):
        assert found[name]["value"] == want(f"torch-fidelity/{name}")
    logits = np.random.default_rng(6).normal(0, 3, (97, 20))
    score, spread = diversity.inception_score(logits)
    assert score == want("torch-fidelity/score") and spread == want("torch-fidelity/score std")


def two_gaussians(count, width, seed=0):
    random = np.random.default_rng(seed)
    mix = random.normal(size=(width, width))
    a, b = random.normal(size=(2, count, width))
    return (a @ mix).astype(np.float32), (b @ mix * 1.1 + 0.3).astype(np.float32)


def test_frechet_is_that_of_the_square_root_of_the_product():
    a, b = two_gaussians(300, 24)
    cov = [np.cov(x, rowvar=False) for x in (a, b)]
    root = np.sqrt(np.linalg.eigvals(cov[0] @ cov[1]).real).sum()
    gap = np.square(a.mean(0, dtype=float) - b.mean(0, dtype=float)).sum()
    want = gap + np.trace(cov[0] + cov[1]) - 2 * root
    assert frechet.frechet(a, b) == pytest.approx(want, rel=1e-6)


def test_torchmetrics_finds_the_same_on_the_same_features():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    a, b = two_gaussians(120, 16)

    class Flat(torch.nn.Module):
        num_features = 16

        def forward(self, x):
            return x.reshape(len(x), -1)[:, :16].double()

    for metric, want, rel in (
        (FrechetInceptionDistance(Flat(), input_img_size=(1, 1, 16)), frechet.frechet(b, a), 1e-3),
        (
            KernelInceptionDistance(Flat(), subsets=1, subset_size=120),
            kernel.kid(b, a, subsets=1).mean,
            1e-3,
        ),
    ):
        metric.update(torch.tensor(a)[:, None, None], real=True)
        metric.update(torch.tensor(b)[:, None, None], real=False)
        found = metric.compute()
        found = found[0] if isinstance(found, tuple) else found
        assert float(found) == pytest.approx(want, rel=rel)


@pytest.mark.parametrize("sign", [1, -1])
def test_torchmetrics_clip_score_is_ours_or_zero(sign):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.multimodal.clip_score import CLIPScore
    text, other = two_gaussians(7, 8)
    image = other + sign * text

    class Model(torch.nn.Module):
        config = SimpleNamespace()

        def get_image_features(self, pixels):
            return torch.tensor(image)

        def get_text_features(self, ids, mask):
            return torch.tensor(text)

    def processor(**_):
        return dict(
            pixel_values=torch.zeros(1), input_ids=torch.zeros(1), attention_mask=torch.zeros(1, 1)
        )

    metric = CLIPScore(lambda: (Model(), processor))
    metric.update([torch.zeros(3, 2, 2, dtype=torch.uint8)] * 7, ["x"] * 7)
    # Its limit of 0 is on the mean, not on each picture.
    ours = clip_score.clip_scores(image, text).mean()
    assert sign * ours > 0
    want = max(ours, 0)
    assert float(metric.compute()) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("neighbours", [1, 5])
def test_prdc_is_that_of_its_package(neighbours):
    from prdc import compute_prdc

    fake, real = two_gaussians(90, 6)
    found = prdc(real, fake, neighbours)
    for name, value in compute_prdc(real, fake, nearest_k=neighbours).items():
        # The package leaves out the border of a ball, on which no other picture lies.
        assert found[name]["value"] == pytest.approx(value, rel=1e-6), name


def test_cmmd_is_its_published_formula():
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in two_gaussians(40, 12))
    a, b = np.float64(a), np.float64(b)
    gamma = 1 / (2 * 10.0**2)

    def mean(x, y):
        return np.exp(-gamma * np.square(x[:, None] - y[None]).sum(-1)).mean()

    want = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    assert kernel.cmmd(3 * a, b)[0] == pytest.approx(want, rel=1e-6)
