"""A config that records which of its keys are read, to find those that nothing reads."""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from sprint_jax.core.config import Config


class Recording:
    """Stands in for a `Config`; ``read`` holds the dotted names of the leaves that were read so far.

    To list the keys, to unpack a section's dict by `to_dict` or to compare configs reads nothing.
    """

    def __init__(self, config: ConfigDict, read: set[str] | None = None, prefix: str = ""):
        self.read = set() if read is None else read
        self._config, self._prefix = config, prefix

    def __getitem__(self, key: str) -> Any:
        value, name = self._config[key], self._prefix + key
        if isinstance(value, ConfigDict):
            return Recording(value, self.read, f"{name}.")
        self.read.add(name)
        return value

    def __getattr__(self, key: str) -> Any:
        return self[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def keys(self) -> list[str]:
        return self._config.keys()

    def to_dict(self) -> dict[str, Any]:
        return self._config.to_dict()

    def override(self, overrides: Mapping[str, Any]) -> "Recording":
        assert isinstance(self._config, Config)
        return Recording(self._config.override(overrides), self.read)
