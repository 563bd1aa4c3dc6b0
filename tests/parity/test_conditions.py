"""HED against torch copies of it with random weights, and maps against OpenCV.

Errors of HED are max|a - b| / max|b|. Lines may differ in 0.1 % of the pixels, since OpenCV adds floats in an
order of its own on ridges that are flat; thickness and Canny's edges differ in none.
"""

import functools

import chex
import cv2
import h5py
import jax
import numpy as np
import pytest
import torch
from helpers.compare import relative_error
from helpers.refusals import refuse
from safetensors.torch import save_file
from torch.nn import functional

from sprint_jax.encoders import conditions, scribble
from sprint_jax.encoders.conditions import load_conditions
from sprint_jax.interop.hed import BSDS_MEAN, hed_table, load_hed
from sprint_jax.models.hed import HED
from sprint_jax.parallel.sharding import make_mesh

RANDOM = np.random.default_rng(0)
DEPTHS = (2, 2, 3, 3, 3)
SMALL = dict(features=(4, 6, 8, 8, 10))


def random_weights(features) -> dict[str, torch.Tensor]:
    """Tensors under the names of ControlNetHED.pth, of a size that keeps activations in theirs."""
    torch.manual_seed(0)
    weights, before = {"norm": 100 * torch.rand(1, 3, 1, 1)}, 3
    for block, (count, depth) in enumerate(zip(features, DEPTHS, strict=True), 1):
        for i in range(depth):
            scale = (2 / (9 * before)) ** 0.5
            weights[f"block{block}.convs.{i}.weight"] = scale * torch.randn(count, before, 3, 3)
            weights[f"block{block}.convs.{i}.bias"] = 0.1 * torch.randn(count)
            before = count
        weights[f"block{block}.projection.weight"] = torch.randn(1, count, 1, 1) / count / 8
        weights[f"block{block}.projection.bias"] = torch.randn(1)
    return weights


def logits(weights, pictures: np.ndarray, ceil=False) -> list[np.ndarray]:
    """The five logit maps, before they are scaled, of each picture: torch's layers by the published table."""
    x = torch.from_numpy(pictures.astype(np.float32)).permute(0, 3, 1, 2) - weights["norm"]
    maps = []
    with torch.no_grad():
        for block, depth in enumerate(DEPTHS, 1):
            if block > 1:
                x = functional.max_pool2d(x, 2, 2, ceil_mode=ceil)
            for i in range(depth):
                name = f"block{block}.convs.{i}"
                x = functional.conv2d(
                    x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1
                )
                x = functional.relu(x)
            name = f"block{block}.projection"
            maps.append(functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"]))
    return [each[:, 0].numpy() for each in maps]


def scaled(maps, height, width) -> np.ndarray:
    """Logit maps at the pictures' size by OpenCV: [5, B, height, width]."""
    resize = lambda a: cv2.resize(a, (width, height), interpolation=cv2.INTER_LINEAR)  # noqa: E731
    return np.stack([[resize(row) for row in each] for each in maps])


def their_edges(weights, pictures: np.ndarray) -> np.ndarray:
    mean = scaled(logits(weights, pictures), *pictures.shape[1:3]).mean(0).astype(np.float64)
    return (255 / (1 + np.exp(-mean))).clip(0, 255).astype(np.uint8)


def their_lines(edges: np.ndarray) -> np.ndarray:
    x = cv2.GaussianBlur(edges.astype(np.float32), (0, 0), 3)
    kernels = np.zeros((4, 3, 3), np.uint8)
    for kernel, ways in zip(kernels, ((0, 1), (1, 0), (1, 1), (1, -1)), strict=True):
        for step in (-1, 0, 1):
            kernel[1 + step * ways[0], 1 + step * ways[1]] = 1
    ridges = np.any([cv2.dilate(x, kernel) == x for kernel in kernels], 0)
    drawn = np.where(ridges & (x > 127), 255, 0).astype(np.uint8)
    return np.where(cv2.GaussianBlur(drawn, (0, 0), 3) > 4, 255, 0).astype(np.uint8)


def their_thickness(lines: np.ndarray, thickness: int) -> np.ndarray:
    if thickness == 0:
        return cv2.erode(lines, np.ones((4, 4), np.uint8))
    size = max(thickness // 2, 1)
    return cv2.dilate(lines, np.ones((size, size), np.uint8))


def pictures(count: int, height: int, width: int) -> np.ndarray:
    """Coloured polygons on a ground, blurred: uint8 [count, height, width, 3]."""
    found = []
    for _ in range(count):
        image = np.full((height, width, 3), RANDOM.integers(0, 256, 3), np.uint8)
        for _ in range(4):
            corners = RANDOM.integers(0, (width, height), (4, 2)).astype(np.int32)
            cv2.fillPoly(image, [corners], RANDOM.integers(0, 256, 3).tolist())
        found.append(cv2.GaussianBlur(image, (0, 0), RANDOM.uniform(0.3, 2)))
    return np.stack(found)


def soft_edges(count: int, height: int, width: int) -> np.ndarray:
    """Maps such as HED makes: lines of all widths and strengths, some with noise, one of noise alone."""
    maps = []
    for number in range(count):
        image = np.zeros((height, width), np.uint8)
        for _ in range(6):
            corners = RANDOM.integers(0, (width, height), (4, 1, 2)).astype(np.int32)
            strength, wide = RANDOM.integers((100, 1), (256, 14)).tolist()
            cv2.polylines(image, [corners], False, strength, wide)
        image = cv2.GaussianBlur(image, (0, 0), RANDOM.uniform(0.5, 4)).astype(int)
        noise = RANDOM.integers(-20, 20, image.shape) if number % 3 == 0 else 0
        maps.append((image + noise).clip(0, 255))
    maps[-1] = RANDOM.integers(0, 256, (height, width))
    return np.stack(maps).astype(np.uint8)


def apply(hed, params, images):
    return jax.jit(hed.apply)({"params": params}, images)


def test_hed_by_a_file_of_torch_and_by_safetensors(tmp_path):
    weights, images = random_weights(SMALL["features"]), pictures(2, 35, 50)
    torch.save(weights, tmp_path / "hed.pth")
    save_file(weights, tmp_path / "hed.safetensors")
    expected = scaled(logits(weights, images), 35, 50).mean(0)
    hed, params = load_hed(tmp_path / "hed.pth", fields=SMALL)
    assert relative_error(apply(hed, params, images), expected) < 2e-5
    again = load_hed(tmp_path / "hed.safetensors", fields=SMALL)
    chex.assert_trees_all_equal(again[1], params)
    assert again[0] == hed


def test_hed_of_bsds500_by_keras_file(tmp_path):
    weights, images = random_weights(SMALL["features"]), pictures(2, 35, 50)
    fuse = np.float32([0.1, 0.3, 0.2, 0.15, 0.25]), np.float32([0.5])
    with h5py.File(tmp_path / "hed.weights.h5", "w") as file:
        for name, tensor in weights.items():
            block, _, rest = name.partition(".")
            if block == "norm":
                continue
            kind, *number, leaf = rest.split(".")
            place = f"{block}/layers/conv2d" + (
                f"_{number[0]}" if number not in ([], ["0"]) else ""
            )
            place = f"dsn{block[-1]}" if kind == "projection" else place
            array = tensor.numpy().transpose(2, 3, 1, 0) if leaf == "weight" else tensor.numpy()
            file[f"{place}/vars/{0 if leaf == 'weight' else 1}"] = array
        file["fuse/vars/0"], file["fuse/vars/1"] = fuse[0].reshape(1, 1, 5, 1), fuse[1]
    # The wheel's pictures are B, G, R less a mean; odd sides are rounded up.
    weights["norm"] = torch.tensor(BSDS_MEAN[::-1]).reshape(1, 3, 1, 1)
    maps = scaled(logits(weights, images[..., ::-1], ceil=True), 35, 50)
    hed, params = load_hed(tmp_path / "hed.weights.h5", fields=SMALL)
    found = apply(hed, params, images)
    assert relative_error(found, np.tensordot(fuse[0], maps, 1) + fuse[1]) < 2e-5


def test_hed_has_the_published_size():
    assert sum(int(np.prod(entry.shape)) for entry in hed_table(HED()).values()) == 14_716_168


def test_maps_from_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(conditions, "load_hed", functools.partial(load_hed, fields=SMALL))
    weights, images = random_weights(SMALL["features"]), pictures(2, 64, 96)
    mean = scaled(logits(weights, images), 64, 96).mean(0)
    # Logits of both signs, as those of edges.
    for block in range(1, 6):
        weights[f"block{block}.projection.bias"] -= float(np.median(mean))
        for leaf in ("weight", "bias"):
            weights[f"block{block}.projection.{leaf}"] *= float(3 / mean.std())
    torch.save(weights, tmp_path / "ControlNetHED.pth")
    edges = their_edges(weights, images)
    lines = np.stack([their_lines(each) for each in edges])
    assert 0.1 < (lines > 0).mean() < 0.9
    thick = np.stack([their_thickness(each, 10) for each in lines])
    for kind, thickness, expected in (("hed", -1, edges), ("scribble", 10, thick)):
        path = str(tmp_path / "ControlNetHED.pth")
        # Two devices, a picture on each.
        mesh = make_mesh(2, devices=jax.local_devices()[:2])
        made = load_conditions(kind, path, thickness=thickness, mesh=mesh)
        (maps,) = made.draw(images, [np.zeros(2, int)])
        assert (np.asarray(maps) == expected[..., None]).mean() > 0.999
    refuse(load_hed, tmp_path / "other.pth", parts=["other.pth"], exit_code=1)
    torch.save(weights | {"norm": load_hed}, tmp_path / "code.pth")
    refuse(load_hed, tmp_path / "code.pth", parts=["code.pth", "load_hed"], exit_code=1)


@pytest.mark.parametrize("size", [(67, 96), (16, 40)])
def test_lines_and_their_thickness_are_those_of_opencv(size):
    edges = soft_edges(8, *size)
    found = np.asarray(scribble.draw_lines(edges))
    lines = np.stack([their_lines(each) for each in edges])
    assert (found != lines).mean() < 1e-3 and 0.1 < (lines > 0).mean() < 1
    for thickness in scribble.THICKNESSES:
        thick = np.asarray(scribble.thicken(lines, np.full(8, thickness)))
        expected = np.stack([their_thickness(each, thickness) for each in lines])
        np.testing.assert_array_equal(thick, expected)


@pytest.mark.parametrize("size", [(67, 96)])
def test_edges_are_those_of_opencv(size):
    images = pictures(6, *size)
    images[-1] = RANDOM.integers(0, 256, images[-1].shape)
    found = np.asarray(scribble.find_edges(images))
    expected = np.stack([cv2.Canny(image, 100, 200) for image in images])
    np.testing.assert_array_equal(found, expected)
    assert 0.005 < (found > 0).mean() < 0.5
