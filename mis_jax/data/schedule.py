"""The sequences of a run: which samples each holds, from the first step to the last.

Samples stand in an endless stream, epoch after epoch, each epoch in an order of its own that (seed,
epoch) decides. A sample's place in the stream is its name in a schedule. Epochs share no sequence.
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
    """What a packed sequence holds at most."""

    tokens: int
    tiles: int


@dataclass(frozen=True)
class SampleSchedule:
    """Sequences of a run. Beyond the last one they are empty, so that every step has as many."""

    places: Int[np.ndarray, " samples"]  # in the stream, sequence by sequence
    samples: Int[np.ndarray, " samples"]  # which sample of the run that is
    starts: Int[np.ndarray, " sequences+1"]  # where each sequence begins in the two above

    @property
    def sequences(self) -> int:
        return len(self.starts) - 1

    def sequence(self, number: int) -> list[tuple[int, int]]:
        """(place, sample) of each sample of a sequence."""
        here = self.span(number, number + 1)
        return [
            (int(p), int(s)) for p, s in zip(self.places[here], self.samples[here], strict=True)
        ]

    def span(self, first: int, last: int) -> slice:
        """Where the samples of sequences `first` to `last - 1` stand in `places` and `samples`."""
        ends = [min(number, self.sequences) for number in (first, last)]
        return slice(*(int(self.starts[end]) for end in ends))

    @property
    def fingerprint(self) -> str:
        """The same for equal schedules alone."""
        hasher = hashlib.sha256()
        for array in (self.places, self.samples, self.starts):
            hasher.update(np.ascontiguousarray(array, np.int64).tobytes())
        return hasher.hexdigest()[:16]


def make_schedule(
    samples: Int[np.ndarray, " samples"],
    tokens: Int[np.ndarray, " annotations"],
    tiles: Int[np.ndarray, " annotations"],
    *,
    seed: int,
    epochs: int | None = None,
    sequences: int | None = None,
    capacity: Capacity | None = None,
) -> SampleSchedule:
    """A schedule of so many `epochs`, or of as many as fill so many `sequences`.

    `samples` are those that take part; `tokens` and `tiles` are the sizes of all. Without a
    `capacity` every sequence holds one sample.
    """
    assert len(samples) and (epochs is None) != (sequences is None)
    packed_places: list[np.ndarray] = []  # of each sequence
    order_of: list[np.ndarray] = []  # samples of each epoch
    for epoch, order in enumerate(_orders(samples, seed)):
        if epoch == epochs or (sequences is not None and len(packed_places) >= sequences):
            break
        if capacity is None:
            packed = [[place] for place in range(len(order))]
        else:
            sizes = tokens[order], tiles[order]
            packed = pack(*sizes, max_tokens=capacity.tokens, max_tiles=capacity.tiles)
        packed_places += [np.array(sequence, np.int64) + epoch * len(order) for sequence in packed]
        order_of.append(order)
    packed_places = packed_places[:sequences]
    places = np.concatenate(packed_places)
    starts = np.cumsum([0, *map(len, packed_places)])
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
