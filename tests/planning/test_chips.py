"""Link bandwidths and rooflines against numbers worked out by hand."""

import itertools
import math
from types import SimpleNamespace

import pytest

from sprint_jax.core.errors import UserError
from sprint_jax.planning.chips import CHIPS, Roofline, chip_of, link_seconds, roofline
from sprint_jax.planning.counts import Collective, Work


def torus(*shape: int, slices: int = 1) -> list[SimpleNamespace]:
    """Devices of a torus, the last axis fastest."""
    places = itertools.product(range(slices), *map(range, shape))
    return [SimpleNamespace(coords=list(place[1:]), slice_index=place[0]) for place in places]


def collective(kind: str, group, moved: float) -> Collective:
    return Collective(kind, "fsdp", len(group), tuple(group), moved)


@pytest.mark.parametrize(
    ("chip", "shape", "kind", "group", "seconds"),
    [
        ("v5e", (16, 16), "all-gather", range(16), 1 / (2 * 45)),  # a whole axis of 16 is a ring
        ("v5e", (16, 16), "all-gather", range(256), 1 / (4 * 45)),
        ("v5e", (16, 16), "all-gather", range(8), 1 / 45),  # half of it is a line
        ("v5e", (8, 8), "all-gather", range(8), 1 / 45),  # v5e has rings of 16 only
        ("v5p", (4, 4, 4), "all-gather", range(4), 1 / (2 * 90)),  # v5p of any multiple of 4
        ("v5p", (4, 4, 4), "all-gather", range(64), 1 / (6 * 90)),
        ("v5e", (16, 16), "all-to-all", range(16), 4 / (2 * 45)),  # passes on what is for others
        ("v5e", (16, 16), "collective-permute", (0, 1), 1 / 45),  # has one link
        ("v5e", (2, 2), "all-reduce", (0, 4), 1 / 3.125),  # between slices
    ],
)
def test_seconds_of_a_gigabyte(chip, shape, kind, group, seconds):
    network, found = link_seconds(
        CHIPS[chip], collective(kind, group, 1e9), torus(*shape, slices=2)
    )
    assert network == ("dcn" if max(group) >= math.prod(shape) else "ici")
    assert found == pytest.approx(seconds)


def test_roofline_names_what_limits():
    gather = collective("all-gather", range(16), 9e9)
    works = [
        Work(2, passes=19.7e12, hbm=8.19e9),  # twice 0.1 s of arithmetic, 0.01 s of memory
        Work(1, hbm=81.9e9),  # 0.1 s
        Work(1, collectives=(gather,)),  # 0.1 s
    ]
    found = roofline(CHIPS["v5e"], works, torus(16, 16))
    assert tuple(found) == pytest.approx((0.2, 0.1, 0.1, 0.0))
    assert found.seconds == pytest.approx(0.3) and found.bound == "compute"
    assert Roofline(0.1, 0.2, 0.1, 0).bound == "memory"
    assert Roofline(0.1, 0.2, 0.4, 0).bound == "ici"
    assert Roofline(0.1, 0.2, 0.4, 0.5).bound == "dcn"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_chips_by_device_kind(kind, name):
    device = SimpleNamespace(device_kind=kind, platform="gpu")
    if name is None:
        with pytest.raises(UserError, match="4090"):
            chip_of(device)
    else:
        assert chip_of(device) == name
