"""Link bandwidths and rooflines against numbers worked out by hand."""

from types import SimpleNamespace

import pytest

from sprint_jax.core.errors import UserError
from sprint_jax.planning.chips import CHIPS, Roofline, chip_of, link_seconds, roofline
from sprint_jax.planning.hlo import Collective, Cost


def torus(*shape: int, slices: int = 1) -> list[SimpleNamespace]:
    """Devices of a torus, the last axis fastest."""
    found = []
    for number in range(slices):
        for x in range(shape[0]):
            for y in range(shape[1]):
                for z in range(shape[2] if len(shape) == 3 else 1):
                    found.append(SimpleNamespace(coords=[x, y, z], slice_index=number))
    return found


def collective(kind: str, group, moved: float) -> Collective:
    return Collective(kind, "fsdp", len(group), tuple(group), moved, moved, "", None)


@pytest.mark.parametrize(
    ("chip", "shape", "group", "links"),
    [
        ("v5e", (16, 16), range(16), 2),  # a whole axis of 16 is a ring
        ("v5e", (16, 16), range(256), 4),
        ("v5e", (16, 16), range(8), 1),  # half of it is a line
        ("v5e", (8, 8), range(8), 1),  # v5e has rings of 16 only
        ("v5e", (4, 4), range(16), 2),
        ("v6e", (2, 4), range(8), 2),
        ("v5p", (4, 4, 4), range(4), 2),  # v5p has rings of any multiple of 4
        ("v5p", (4, 4, 4), range(64), 6),
        ("v5p", (2, 2, 1), range(4), 2),
    ],
)
def test_links_by_shape(chip, shape, group, links):
    each = collective("all-gather", group, 9e9)
    network, seconds = link_seconds(CHIPS[chip], each, torus(*shape))
    assert network == "ici"
    assert seconds == pytest.approx(9e9 / (links * CHIPS[chip].link))


def test_between_slices_the_data_centres_network_counts():
    devices = torus(2, 2, slices=2)
    each = collective("all-reduce", (0, 4), 1e9)
    assert link_seconds(CHIPS["v5e"], each, devices) == ("dcn", pytest.approx(1e9 / 3.125e9))


def test_an_all_to_all_passes_on_what_is_for_others_and_a_permute_has_one_link():
    devices = torus(16, 16)
    moved = link_seconds(CHIPS["v5e"], collective("all-to-all", range(16), 9e9), devices)
    assert moved[1] == pytest.approx(9e9 / (2 * 45e9) * 4)
    sent = link_seconds(CHIPS["v5e"], collective("collective-permute", (0, 1), 9e9), devices)
    assert sent[1] == pytest.approx(9e9 / 45e9)


def test_roofline_names_what_limits():
    each = collective("all-gather", range(16), 9e9)
    cost = Cost(compute_seconds=0.2, memory_seconds=0.1, collectives=(each,))
    found = roofline(CHIPS["v5e"], cost, torus(16, 16))
    assert found == Roofline(0.2, 0.1, pytest.approx(0.1), 0.0)
    assert found.seconds == pytest.approx(0.3) and found.bound == "compute"
    assert found.serial == pytest.approx(0.4)
    assert Roofline(0.1, 0.2, 0.1, 0).bound == "memory"
    assert Roofline(0.1, 0.2, 0.4, 0).bound == "ici"
    assert Roofline(0.1, 0.2, 0.4, 0.5).bound == "dcn"


def test_chips_by_device_kind():
    def device(kind, platform="tpu"):
        return SimpleNamespace(device_kind=kind, platform=platform)

    assert chip_of(device("TPU v5 lite")) == "v5e"
    assert chip_of(device("TPU v5")) == "v5p"
    assert chip_of(device("NVIDIA H100 80GB HBM3", "gpu")) == "H100"
    assert chip_of(device("NVIDIA A100-SXM4-80GB", "gpu")) == "A100"
    assert chip_of(device("cpu", "cpu")) == "cpu"
    with pytest.raises(UserError, match="GeForce"):
        chip_of(device("NVIDIA GeForce RTX 4090", "gpu"))
