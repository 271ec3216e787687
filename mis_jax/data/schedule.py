"""The rows of a run: which samples each holds, from the first step to the last.

Samples stand in an endless stream, epoch after epoch, each epoch in an order of its own that
(seed, epoch) decides. A sample's place in the stream is its name in a plan. Epochs share no row.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import grain
import numpy as np
from jaxtyping import Int

from mis_jax.data.packing import pack


@dataclass(frozen=True)
class Capacity:
    """What a packed row holds at most."""

    tokens: int
    tiles: int


@dataclass(frozen=True)
class SampleSchedule:
    """Rows of a run. Beyond the last one rows are empty, so that every step has as many."""

    places: Int[np.ndarray, " samples"]  # in the stream, row by row
    samples: Int[np.ndarray, " samples"]  # which sample of the run that is
    starts: Int[np.ndarray, " rows+1"]  # where each row begins in the two above

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> list[tuple[int, int]]:
        """(place, sample) of each sample of a row."""
        here = self.span(number, number + 1)
        return [
            (int(p), int(s)) for p, s in zip(self.places[here], self.samples[here], strict=True)
        ]

    def span(self, first: int, last: int) -> slice:
        """Where the samples of rows `first` to `last - 1` stand in `places` and `samples`."""
        ends = [min(number, self.rows) for number in (first, last)]
        return slice(*(int(self.starts[end]) for end in ends))

    @property
    def fingerprint(self) -> str:
        """The same for equal plans alone."""
        found = hashlib.sha256()
        for array in (self.places, self.samples, self.starts):
            found.update(np.ascontiguousarray(array, np.int64).tobytes())
        return found.hexdigest()[:16]


def make_schedule(
    samples: Int[np.ndarray, " samples"],
    tokens: Int[np.ndarray, " rows"],
    tiles: Int[np.ndarray, " rows"],
    *,
    seed: int,
    epochs: int | None = None,
    rows: int | None = None,
    capacity: Capacity | None = None,
) -> SampleSchedule:
    """A plan of so many `epochs`, or of as many as fill so many `rows`.

    `samples` are those that take part; `tokens` and `tiles` are the sizes of all. Without a
    `capacity` every row holds one sample.
    """
    assert len(samples) and (epochs is None) != (rows is None)
    found: list[np.ndarray] = []  # places of each row
    order_of: list[np.ndarray] = []  # samples of each epoch
    for epoch, order in enumerate(_orders(samples, seed)):
        if epoch == epochs or (rows is not None and len(found) >= rows):
            break
        if capacity is None:
            packed = [[place] for place in range(len(order))]
        else:
            sizes = tokens[order], tiles[order]
            packed = pack(*sizes, max_tokens=capacity.tokens, max_tiles=capacity.tiles)
        found += [np.array(row, np.int64) + epoch * len(order) for row in packed]
        order_of.append(order)
    found = found[:rows]
    places = np.concatenate(found)
    starts = np.cumsum([0, *map(len, found)])
    return SampleSchedule(places, np.concatenate(order_of)[places], starts)


def _orders(samples: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """The samples in the order of each epoch."""
    stream = grain.MapDataset.range(len(samples)).seed(seed).shuffle().repeat()
    epoch = 0
    while True:
        first = epoch * len(samples)
        places = range(first, first + len(samples))
        yield samples[np.array([stream[place] for place in places])]
        epoch += 1
