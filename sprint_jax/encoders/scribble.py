"""Lines along edges, as the published control branches saw them: OpenCV's arithmetic, on any device.

Maps are [B, H, W]; those of lines are uint8, 255 on 0. Blurs are OpenCV's ``GaussianBlur`` of sigma 3, which
takes 25 weights in float32 and 19 in uint8, and reflects pictures at their borders.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

SIGMA = 3.0
STRONG = 127  # of 255: the least that a line's ridge is
FADED = 4  # of 255: where blurred lines end; a ridge of one pixel becomes a line of 11
THICKNESSES = range(25)
# Of Canny: sums of absolute derivatives.
LOW, HIGH = 100, 200
_SLOPE = 13573  # tan(22.5 degrees) in 1/32768


@jax.jit
def draw_lines(edges: Array) -> Array:
    """Lines along the ridges of soft edges uint8 [B, H, W]: non-maximum suppression, blur, threshold.

    A ridge is a pixel above `STRONG` that no neighbour exceeds on a line through it, in one of four directions
    at least (so plateaus are ridges).
    """
    x = _blur(edges.astype(jnp.float32), _float_weights())
    ridge = jnp.zeros(x.shape, bool)
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        ridge |= (x >= _shift(x, dy, dx, -jnp.inf)) & (x >= _shift(x, -dy, -dx, -jnp.inf))
    drawn = jnp.where(ridge & (x > STRONG), 255, 0)
    # In 1/65536, and rounded: all of it in whole numbers, as OpenCV blurs bytes.
    blurred = (_blur(drawn, _fixed_weights()) + (1 << 15)) >> 16
    return jnp.where(blurred > FADED, 255, 0).astype(jnp.uint8)


@jax.jit
def thicken(lines: Array, thickness: Array) -> Array:
    """Lines [B, H, W] uint8 in another thickness [B], of `THICKNESSES`.

    0 erodes by 4 x 4 pixels, 1 to 3 change nothing, and k from 4 on dilates by k // 2 along each side.
    """
    erodes = (thickness == 0)[:, None, None]
    size = jnp.where(thickness == 0, 4, jnp.maximum(thickness // 2, 1))[:, None, None]
    most = max(THICKNESSES) // 2
    # Eroding lines is dilating the ground. Pixels outside the picture count for neither.
    x = jnp.where(erodes, 255 - lines, lines)
    for axis in (0, 1):
        wide = x
        for step in range(-(most // 2), (most + 1) // 2):
            inside = (step >= -(size // 2)) & (step < size - size // 2)
            moved = _shift(x, *((step, 0) if axis == 0 else (0, step)), 0)
            wide = jnp.maximum(wide, jnp.where(inside, moved, jnp.uint8(0)))
        x = wide
    return jnp.where(erodes, 255 - x, x)


@jax.jit
def find_edges(pictures: Array, low: int = LOW, high: int = HIGH) -> Array:
    """Canny's edges of pictures uint8 [B, H, W, 3], one pixel wide: OpenCV's ``Canny`` without blur.

    Of the three channels, the one whose derivatives are largest counts, pixel by pixel.
    """
    x = pictures.astype(jnp.int32)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    columns = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    dx, dy = rows[:, :, 2:] - rows[:, :, :-2], columns[:, 2:] - columns[:, :-2]
    largest = jnp.argmax(jnp.abs(dx) + jnp.abs(dy), -1)[..., None]
    dx, dy = (jnp.take_along_axis(d, largest, -1)[..., 0] for d in (dx, dy))
    size = jnp.abs(dx) + jnp.abs(dy)

    def ridge(dy, dx, or_equal=False):
        after = _shift(size, dy, dx, 0)
        return (size > _shift(size, -dy, -dx, 0)) & (size >= after if or_equal else size > after)

    flat = jnp.abs(dx) * _SLOPE
    height = jnp.abs(dy) << 15
    diagonal = jnp.where((dx ^ dy) < 0, ridge(1, -1), ridge(1, 1))
    upright = jnp.where(height > flat + (jnp.abs(dx) << 16), ridge(1, 0, True), diagonal)
    kept = (size > low) & jnp.where(height < flat, ridge(0, 1, True), upright)

    def grow(state):
        found, _ = state
        near = found
        for dy, dx in ((0, 1), (0, -1)):
            near |= _shift(found, dy, dx, False)
        for dy in (1, -1):
            near |= _shift(near, dy, 0, False)
        more = kept & near
        return more, (more != found).any()

    strong = kept & (size > high)
    found, _ = jax.lax.while_loop(lambda state: state[1], grow, (strong, jnp.array(True)))
    return jnp.where(found, 255, 0).astype(jnp.uint8)


def _shift(x: Array, dy: int, dx: int, outside) -> Array:
    """x[:, i + dy, j + dx] at each pixel; ``outside`` beyond the borders."""
    height, width = x.shape[1:]
    pads = (0, 0), (max(-dy, 0), max(dy, 0)), (max(-dx, 0), max(dx, 0))
    x = jnp.pad(x, pads, constant_values=outside)
    return x[:, max(dy, 0) : max(dy, 0) + height, max(dx, 0) : max(dx, 0) + width]


def _blur(x: Array, weights: np.ndarray) -> Array:
    """Weighted sums along rows, then columns, in the type of ``x``; symmetric, from the middle outwards."""
    reach = len(weights) // 2
    for axis in (2, 1):
        pads = [(reach, reach) if each == axis else (0, 0) for each in range(3)]
        padded = jnp.pad(x, pads, mode="reflect")
        part = functools.partial(
            jax.lax.dynamic_slice_in_dim, padded, slice_size=x.shape[axis], axis=axis
        )
        x = part(reach) * weights[reach].item()
        for i in range(1, reach + 1):
            x += (part(reach - i) + part(reach + i)) * weights[reach + i].item()
    return x


def _gaussian(count: int) -> np.ndarray:
    places = np.arange(count) - count // 2
    weights = np.exp(-(places**2) / (2 * SIGMA**2))
    return weights / weights.sum()


def _float_weights() -> np.ndarray:
    return _gaussian(25).astype(np.float32)


def _fixed_weights() -> np.ndarray:
    """19 weights in 1/256: what rounding loses goes to the next one, and to the middle."""
    exact, weights, rest = 256 * _gaussian(19), np.zeros(19, int), 0.0
    for i in range(9):
        weights[i] = weights[18 - i] = math.floor(exact[i] + rest + 0.5)
        rest += exact[i] - weights[i]
    weights[9] = 256 - weights.sum()
    return weights
