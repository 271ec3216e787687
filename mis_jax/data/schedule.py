"""The sequences of a run: which samples each holds, from the first step to the last.

Samples stand in an endless stream, epoch after epoch, each epoch in an order of its own that (seed,
epoch) decides. A sample's place in the stream is its name in a schedule. Epochs share no sequence.

The official code counts steps in another way, which `Rounding` repeats: its data loader repeats the
first samples of an epoch until every GPU has a whole batch (accelerate's `even_batches`), its
trainer stops after the whole steps of an epoch times the epochs, and accumulation runs on from one
epoch into the next (`_inner_training_loop` of transformers 4.37, which InternVL pins).
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
class Rounding:
    """Epochs are padded to a `multiple` of sequences; the run has their whole steps of `batch`."""

    multiple: int
    batch: int


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
    rounding: Rounding | None = None,
) -> SampleSchedule:
    """A schedule of so many `epochs`, or of as many as fill so many `sequences`.

    `samples` are those that take part; `tokens` and `tiles` are the sizes of all. Without a
    `capacity` every sequence holds one sample. Without a `rounding` every sample is taken once an
    epoch.

    Raises:
        ValueError: an epoch that `rounding` leaves without a step.
    """
    assert len(samples) and (epochs is None) != (sequences is None)
    packed_places: list[np.ndarray] = []  # of each sequence
    order_of: list[np.ndarray] = []  # samples of each epoch
    start = whole = 0  # place of the epoch's first sample; sequences of whole steps
    for epoch, order in enumerate(_orders(samples, seed)):
        if epoch == epochs or (sequences is not None and len(packed_places) >= sequences):
            break
        if capacity is None:
            packed = [[place] for place in range(len(order))]
        else:
            sizes = tokens[order], tiles[order]
            packed = pack(*sizes, max_tokens=capacity.tokens, max_tiles=capacity.tiles)
        if rounding is not None:
            order = _padded(packed, order, rounding.multiple)
            whole += len(packed) // rounding.batch * rounding.batch
        packed_places += [np.array(sequence, np.int64) + start for sequence in packed]
        order_of.append(order)
        start += len(order)
    if rounding is not None and sequences is None:
        if not whole:
            raise ValueError(
                f"train.epoch_multiple: the {len(samples)} samples of an epoch make no whole step "
                f"of {rounding.batch} sequences; leave it out or lower train.global_batch"
            )
        sequences = whole
    packed_places = packed_places[:sequences]
    places = np.concatenate(packed_places)
    starts = np.cumsum([0, *map(len, packed_places)])
    return SampleSchedule(places, np.concatenate(order_of)[places], starts)


def _padded(packed: list[list[int]], order: np.ndarray, multiple: int) -> np.ndarray:
    """Repeat the first sequences, in places of their own; the order with what is repeated."""
    end, first = len(order), list(packed)
    for number in range(-len(packed) % multiple):
        again = first[number % len(first)]
        packed.append(list(range(end, end + len(again))))
        order, end = np.append(order, order[again]), end + len(again)
    return order


def _orders(samples: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """The samples in the order of each epoch."""
    stream = grain.MapDataset.range(len(samples)).seed(seed).shuffle().repeat()
    epoch = 0
    while True:
        first = epoch * len(samples)
        places = range(first, first + len(samples))
        yield samples[np.array([stream[place] for place in places])]
        epoch += 1
