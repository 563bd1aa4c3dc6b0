"""Picture sheets: a table of pictures with captions, and ticks for right and wrong."""

import io
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .files import write_atomic
from .storage import AnyPath

FONT_SIZE = 13
GAP = 8
GRID_LIMIT = 400  # pictures; a larger grid is neither looked at nor quickly opened
GREEN, RED, BLACK, WHITE = (0, 150, 0), (205, 0, 0), (0, 0, 0), (255, 255, 255)


class Cell(NamedTuple):
    """A place of a sheet: uint8 picture [H, W, 3], caption, and a tick, a cross or nothing."""

    picture: np.ndarray
    caption: str = ""
    right: bool | None = None


def enlarge(picture: np.ndarray, factor: int) -> np.ndarray:
    """Enlarges [H, W, C] to [factor H, factor W, C], each pixel a square."""
    return picture.repeat(factor, 0).repeat(factor, 1)


def draw_sheet(
    rows: Sequence[Sequence[Cell]],
    *,
    titles: Sequence[str] = (),
    names: Sequence[str] = (),
    smallest: int = 96,
) -> Image.Image:
    """Draws cells in rows, each picture with its caption and tick below.

    Args:
      rows: cells, all pictures of one size; rows may differ in length.
      titles: of the columns, written above the first row.
      names: of the rows, written to the left of each.
      smallest: pictures narrower than so many pixels are enlarged by a whole factor.

    Returns:
      An RGB picture on white.
    """
    height, width = rows[0][0].picture.shape[:2]
    factor = max(1, -(-smallest // width))
    height, width = height * factor, width * factor
    font = ImageFont.load_default(FONT_SIZE)
    line = FONT_SIZE + 3
    letters = max(8, int(width / font.getlength("n")))
    marked = any(cell.right is not None for row in rows for cell in row)
    narrow = letters - 3 if marked else letters
    texts = [[textwrap.wrap(cell.caption, narrow) for cell in row] for row in rows]
    heads = [textwrap.wrap(title, letters) for title in titles]
    top = GAP + line * max((len(head) for head in heads), default=0)
    heights = [height + GAP + line * max(marked, *map(len, row)) for row in texts]

    columns = max(len(titles), *map(len, rows))
    margin = GAP + max((int(font.getlength(name)) + GAP for name in names), default=0)
    size = margin + columns * (width + GAP), top + sum(heights) + GAP
    sheet = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        draw.text((margin + column * (width + GAP), GAP // 2), "\n".join(head), BLACK, font)
    named = [*names, *[""] * (len(rows) - len(names))]
    for name, row, row_texts, row_height in zip(named, rows, texts, heights, strict=True):
        draw.text((GAP, top + height // 2), name, BLACK, font)
        for column, (cell, text) in enumerate(zip(row, row_texts, strict=True)):
            left = margin + column * (width + GAP)
            sheet.paste(Image.fromarray(enlarge(cell.picture, factor)), (left, top))
            draw.text((left, top + height + 2), "\n".join(text), BLACK, font)
            if cell.right is not None:
                _mark(draw, cell.right, left + width, top + height + line + 2)
        top += row_height
    return sheet


def save_picture(path: AnyPath, picture: Image.Image) -> None:
    """Writes a PNG file, whole or not at all; raises UserError, naming it, when that cannot be done."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    write_atomic(path, content.getvalue())


def write_pictures(
    out: AnyPath, images: list[Image.Image], captions: list[str], *, scale: int = 1
) -> None:
    """Writes ``out``/00000.png ... and grid.png.

    Args:
      out: an existing folder; files of these names are replaced.
      images, captions: equally many, images of one size.
      scale: whole factor by which the single files are enlarged.
    """
    pictures = [np.asarray(image) for image in images]
    for index, picture in enumerate(pictures):
        save_picture(out / f"{index:05d}.png", Image.fromarray(enlarge(picture, scale)))
    cells = [Cell(*pair) for pair in zip(pictures, captions, strict=True)][:GRID_LIMIT]
    columns = int(np.ceil(np.sqrt(len(cells))))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    save_picture(out / "grid.png", draw_sheet(rows))


def _mark(draw: ImageDraw.ImageDraw, right: bool, x: int, y: int) -> None:
    """Draws a tick or a cross in the square of 16 whose lower right corner is (x, y)."""
    tick, cross = [[(14, 9), (10, 4), (4, 14)]], [[(14, 14), (4, 4)], [(14, 4), (4, 14)]]
    for line in tick if right else cross:
        draw.line([(x - dx, y - dy) for dx, dy in line], GREEN if right else RED, 3)
