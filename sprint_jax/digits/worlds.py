"""The sizes of the digits worlds: grids of cells and numbers of scenes, without slow imports."""

import dataclasses

from ..core.errors import UserError
from .captions import CATEGORIES

CELL = 8  # pixels along a side of a cell


@dataclasses.dataclass(frozen=True)
class World:
    """The size of a world: grid of cells (rows, columns) and number of scenes in each split."""

    cells: tuple[int, int]
    train: int
    test: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        return CELL * self.cells[0], CELL * self.cells[1]

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories of this world's captions."""
        return CATEGORIES if self.cells[0] * self.cells[1] > 1 else CATEGORIES[:2]


WORLDS = {
    "small": World(cells=(1, 1), train=10_000, test=2_000),  # 8x8 pixels, one digit
    "full": World(cells=(1, 2), train=20_000, test=4_000),  # 8x16 pixels, one or two digits
    "large": World(cells=(2, 2), train=20_000, test=4_000),  # 16x16 pixels, likewise
}


def get_world(name: str) -> World:
    """Returns the world of that name; raises UserError for an unknown one."""
    if name not in WORLDS:
        raise UserError(f"world {name!r} is unknown: choose one of {', '.join(WORLDS)}", 2)
    return WORLDS[name]
