"""Numbers of a server in Prometheus' text format."""

import bisect
import collections
from collections.abc import Iterator, Mapping, Sequence

MILLISECONDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Histogram:
    """Counts of values by upper bounds, and their sum."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, scale: float, label: str = "") -> Iterator[str]:
        """Lines of Prometheus, whose counts are cumulative; values are divided by ``scale``."""
        total, before = 0, f"{label}," if label else ""
        for bound, count in zip((*self.bounds, None), self.counts, strict=True):
            total += count
            text = "+Inf" if bound is None else f"{bound / scale:g}"
            yield f'{name}_bucket{{{before}le="{text}"}} {total}'
        names = f"{{{label}}}" if label else ""
        yield f"{name}_sum{names} {self.sum / scale:.6f}"
        yield f"{name}_count{names} {total}"


class Counters:
    """What a server did since it started.

    Attributes:
      pictures, dropped: requests that were answered, and those that a newer one replaced.
      failures: calls of the model that ended in an exception.
      refused: requests by the code of their refusal.
    """

    def __init__(self):
        self.pictures = self.dropped = self.failures = 0
        self.refused: collections.Counter[str] = collections.Counter()
        self._sizes = Histogram(SIZES)
        self._phases: dict[str, Histogram] = {}

    def batch(self, size: int) -> None:
        """Counts a call of the model for so many pictures."""
        self._sizes.add(size)

    def picture(self, ms: Mapping[str, float]) -> None:
        """Counts a picture and its milliseconds by phase."""
        self.pictures += 1
        for phase, value in ms.items():
            self._phases.setdefault(phase, Histogram(MILLISECONDS)).add(value)

    def text(self, clients: int, waiting: int) -> str:
        """The page of Prometheus; ``clients`` are connected, ``waiting`` jobs in the line."""
        lines = []

        def add(name, kind, what, *values):
            lines.extend([f"# HELP {name} {what}", f"# TYPE {name} {kind}", *values])

        def one(name, kind, what, value):
            add(name, kind, what, f"{name} {value}")

        one("sprint_pictures_total", "counter", "Pictures that were sent.", self.pictures)
        one("sprint_dropped_total", "counter", "Requests that a newer one replaced.", self.dropped)
        one("sprint_failures_total", "counter", "Calls of the model that failed.", self.failures)
        codes = sorted(self.refused.items())
        name = "sprint_refused_total"
        refused = [f'{name}{{code="{code}"}} {count}' for code, count in codes]
        add(name, "counter", "Requests that were refused, by reason.", *refused)
        one("sprint_clients", "gauge", "Pages that are connected.", clients)
        one("sprint_waiting", "gauge", "Requests in the line before the model.", waiting)
        name = "sprint_batch_pictures"
        add(name, "histogram", "Pictures in one call.", *self._sizes.lines(name, 1))
        name, phases = "sprint_seconds", []
        for phase, histogram in sorted(self._phases.items()):
            phases += histogram.lines(name, 1000, f'phase="{phase}"')
        add(name, "histogram", "Seconds of a request by phase.", *phases)
        return "\n".join(lines) + "\n"
