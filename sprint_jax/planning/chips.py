"""Table of accelerators' peaks, and the least time of a program by them.

``hbm_bytes`` of TPUs is what their compiler lets a program use, as libtpu 0.0.52 names it when a program is too
large ("exceeds available HBM (15.75G)"). Sources of the other numbers:

- TPUs: Google Cloud TPU documentation, "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e": FLOP/s, HBM bandwidth, ring
  sizes and data centre network per pod (v5e 6.4 Tbit/s, v6e 25.6 Tbit/s per 256 chips, v5p 50 Gbit/s per chip).
- ICI per link and direction, and DCN of v4: "How to Scale Your Model" (the JAX scaling book), part 2, "TPU
  specs"; a tenth below the documentation's figure divided by the number of ports.
- GPUs: NVIDIA datasheets "A100 Tensor Core GPU" (80 GB SXM), "H100 Tensor Core GPU" (SXM), "H200 Tensor Core
  GPU", dense bfloat16, NVLink in one direction; network of DGX A100 and DGX H100 user guides, per GPU. Float32
  runs as TF32 at half the rate of bfloat16, or at 'highest' precision outside the tensor cores: 19.5 and 67
  TFLOP/s, a sixteenth and a fifteenth.
- cpu: a rough guide, of two cores in float32.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..core.errors import UserError
from .counts import PASSES, Collective, Work


class Chip(NamedTuple):
    """One accelerator.

    Attributes:
      flops: bfloat16 FLOP/s at most. hbm_bytes: bytes that programs can use. hbm: bytes/s of main memory.
      link: bytes/s of one link in one direction. ring: an axis of so many chips, or of a multiple where
        ``multiples``, is a closed ring, with two links per chip; other axes are lines with one.
      dcn: bytes/s per chip between slices or nodes.
      passes: times as long as in bfloat16 that a float32 product takes, by `jax.lax.Precision`.
    """

    flops: float
    hbm_bytes: float
    hbm: float
    link: float
    ring: int
    multiples: bool
    dcn: float
    passes: dict[str, int] = PASSES


# JAX documents 'high' and the default as TF32 on GPUs.
GPU_PASSES = {"default": 2, "high": 2, "highest": 15}
GIB = 2**30
CHIPS = {
    "v4": Chip(275e12, 30.75 * GIB, 1200e9, 45e9, 4, True, 6.25e9),
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 45e9, 16, False, 3.125e9),
    "v5p": Chip(459e12, 95.73 * GIB, 2765e9, 90e9, 4, True, 6.25e9),
    "v6e": Chip(918e12, 31.24 * GIB, 1640e9, 90e9, 16, False, 12.5e9),
    "A100": Chip(312e12, 80e9, 2039e9, 300e9, 0, False, 25e9, GPU_PASSES),
    "H100": Chip(989e12, 80e9, 3350e9, 450e9, 0, False, 50e9, GPU_PASSES),
    "H200": Chip(989e12, 141e9, 4800e9, 450e9, 0, False, 50e9, GPU_PASSES),
    "cpu": Chip(240e9, 0.0, 20e9, 10e9, 0, False, 1e9),
}
# Device kinds of JAX that do not hold the table's name.
_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v6 lite": "v6e"}
_KINDS |= {"TPU v5": "v5p", "TPU v5p": "v5p"}


class Roofline(NamedTuple):
    """Seconds that one run of a program takes at least.

    ``compute`` and ``memory`` sum over its instructions, each by what limits it; ``ici`` and ``dcn`` are links
    alone, between chips and between slices.
    """

    compute: float = 0.0
    memory: float = 0.0
    ici: float = 0.0
    dcn: float = 0.0

    @property
    def seconds(self) -> float:
        """The largest of (compute + memory, ici, dcn): links hide behind arithmetic."""
        return max(self.compute + self.memory, self.ici, self.dcn)

    @property
    def bound(self) -> str:
        """What limits it: compute, memory, ici or dcn."""
        if self.seconds == self.compute + self.memory:
            return "compute" if self.compute >= self.memory else "memory"
        return "ici" if self.ici >= self.dcn else "dcn"


def chip_of(device) -> str:
    """Returns the table's name of a JAX device. Raises UserError for one that it lacks."""
    kind = device.device_kind
    if device.platform == "cpu" and kind not in _KINDS:
        return "cpu"
    found = _KINDS.get(kind) or next((name for name in CHIPS if name in kind.upper()), None)
    if found is None:
        raise UserError(
            f"no data on '{kind}'; sprint_jax/planning/chips.py knows {', '.join(CHIPS)}"
        )
    return found


def roofline(chip: Chip, works: Iterable[Work], devices: Sequence) -> Roofline:
    """The roofline of a program whose partition i runs on ``devices[i]``."""
    spent = dict.fromkeys(Roofline._fields, 0.0)
    for work in works:
        # One instruction computes while it reads and writes.
        compute, memory = work.passes / chip.flops, work.hbm / chip.hbm
        spent["compute" if compute >= memory else "memory"] += work.count * max(compute, memory)
        for each in work.collectives:
            network, seconds = link_seconds(chip, each, devices)
            spent[network] += work.count * seconds
    return Roofline(**spent)


def link_seconds(chip: Chip, each: Collective, devices: Sequence) -> tuple[str, float]:
    """Which network a collective uses, and the seconds of one run of it.

    Inside a slice a group of chips has, along every axis of the torus that it spans, one link per chip and
    direction, or two where it spans a closed ring. An all-to-all passes others' data on: n / 4 times as long
    on n chips. Between hosts with GPUs a ring of them crosses the network once, over the cards' own network
    links together.
    """
    group = [devices[number] for number in each.group]
    hosts = {getattr(device, "process_index", 0) for device in group}
    if not chip.ring and len(hosts) > 1:
        shared = each.kind in ("all-gather", "reduce-scatter", "all-reduce")
        return "dcn", each.moved / chip.dcn / (len(group) / len(hosts) if shared else 1)
    slices = [getattr(device, "slice_index", 0) or 0 for device in group]
    if len(set(slices)) > 1 or each.axes == "dcn":
        return "dcn", each.moved / chip.dcn
    bandwidth = chip.link * sum(_links(chip, group, devices))
    if each.kind == "collective-permute":
        bandwidth = chip.link
    if each.kind == "all-to-all" and chip.ring:
        bandwidth /= max(1.0, each.size / 4)
    return "ici", each.moved / bandwidth


def _links(chip: Chip, group: Sequence, devices: Sequence) -> list[int]:
    """Links of one direction along each axis that a group spans; one where there is no torus."""
    if not chip.ring or not hasattr(group[0], "coords"):
        return [1]
    counts = []
    for axis in range(len(group[0].coords)):
        whole = len({device.coords[axis] for device in devices})
        spanned = len({device.coords[axis] for device in group})
        if spanned > 1:
            ring = whole % chip.ring == 0 if chip.multiples else whole == chip.ring
            counts.append(2 if ring and spanned == whole else 1)
    return counts or [1]
