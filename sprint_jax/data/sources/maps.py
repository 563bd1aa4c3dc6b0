"""Maps for a control branch that lie beside the pictures of a source: folders or tars of them, by key."""

from collections.abc import Sequence

from ...core.errors import UserError
from .files import FileSource
from .open import open_images
from .records import Record, Rejected, Source, hash_identity


class WithMaps:
    """A source whose records have a map of the same key as ``control``, a `records.Source`.

    A record without one is rejected.
    """

    def __init__(self, source: Source, maps: FileSource):
        self.name = source.name
        self.identity = hash_identity("maps", [source.identity, maps.identity])
        self._source, self._maps = source, maps
        self._places = {key: place for place, key in enumerate(maps.keys())}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        """Reads record and map; raises `Rejected`."""
        record = self._source[index]
        return record._replace(control=self._maps[self._place(record.key)].image)

    def measure(self, index: int) -> tuple[str, tuple[int, int]]:
        """Reads key and (height, width) of the image; raises `Rejected`."""
        key, size = self._source.measure(index)
        self._place(key)
        return key, size

    def _place(self, key: str) -> int:
        if key not in self._places:
            raise Rejected(key, f"no map: {self._maps.name} has none of this key")
        return self._places[key]


def with_maps(sources: Sequence[Source], paths: Sequence[str]) -> tuple[WithMaps, ...]:
    """Gives each source the maps of a path: a folder or tars, as `open.open_images` takes them.

    Raises:
      UserError: other than one path for each source, or one that has no keys to look maps up by.
    """
    if len(paths) != len(sources):
        raise UserError(
            f"config.data.control_maps names {len(paths)} folders of maps: give one for each of "
            f"{len(sources)} in data.images",
            exit_code=2,
        )
    found = []
    for source, path in zip(sources, paths, strict=True):
        (maps,) = open_images([path])
        if not isinstance(maps, FileSource):
            raise UserError(f"config.data.control_maps: {path} must be a folder or tars of maps", 2)
        found.append(WithMaps(source, maps))
    return tuple(found)
