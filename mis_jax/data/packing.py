"""Which samples share a sequence: tokens and tiles packed into sequences of one fixed shape.

A packing is a function of the sizes of the samples and of their order alone, made before training.
So every host knows every sequence, a run goes on at any step without looking at what came before,
and the order does not depend on how many processes read it.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from mis_jax.model.batch import MAX_SEGMENTS

#: Samples that a sequence is chosen from: more fill sequences better and move samples further.
LOOK_AHEAD = 128
_ROUNDING = 1e-9  # of sums of shares


def pack(
    tokens: Int[np.ndarray, " samples"],
    tiles: Int[np.ndarray, " samples"],
    *,
    max_tokens: int,
    max_tiles: int,
    look_ahead: int = LOOK_AHEAD,
) -> list[list[int]]:
    """Places of the samples of each sequence; every sample is in one sequence.

    A sequence begins with the oldest sample that waits and takes, of the next `look_ahead`, the one
    that uses most of what the sequence has most of left, until none fits (the dot-product rule of
    vector bin packing: Panigrahy et al. 2011). Then samples are exchanged for waiting ones while
    that fills the sequence better. Every sample must fit a sequence by itself.
    """
    assert not len(tokens) or (tokens.max() <= max_tokens and tiles.max() <= max_tiles)
    shares = np.stack([tokens / max_tokens, tiles / max(max_tiles, 1)], axis=1)
    waiting: list[int] = []
    upcoming, sequences = 0, []
    while waiting or upcoming < len(tokens):
        sequence: list[int] = []
        while True:
            while len(waiting) < look_ahead and upcoming < len(tokens):
                waiting.append(upcoming)
                upcoming += 1
            if not sequence:
                sequence.append(waiting.pop(0))
            left = 1 - shares[sequence].sum(axis=0)
            if not (
                _add(sequence, waiting, left, shares) or _exchange(sequence, waiting, left, shares)
            ):
                break
        sequences.append(sequence)
    return sequences


def _add(sequence: list[int], waiting: list[int], left: np.ndarray, shares: np.ndarray) -> bool:
    """Move the waiting sample that suits what is left best in; False if none fits."""
    if len(sequence) == MAX_SEGMENTS:
        return False
    candidates = shares[waiting]
    fits = (candidates <= left + _ROUNDING).all(axis=1)
    if not fits.any():
        return False
    sequence.append(waiting.pop(int(np.argmax(np.where(fits, candidates @ left, -1)))))
    return True


def _exchange(
    sequence: list[int], waiting: list[int], left: np.ndarray, shares: np.ndarray
) -> bool:
    """Swap the pair that leaves least of the sequence empty; False if none leaves less than now.

    The oldest sample of the sequence stays.
    """
    if len(sequence) < 2 or not waiting:
        return False
    after = (left + shares[sequence[1:]])[:, None] - shares[waiting]  # [own, waiting, 2]
    gain = np.where((after >= -_ROUNDING).all(-1), left.sum() - after.sum(-1), 0)
    here, there = np.unravel_index(np.argmax(gain), gain.shape)
    if gain[here, there] <= 1e-6:
        return False
    sequence[1 + here], waiting[there] = waiting[there], sequence[1 + here]
    waiting.sort()
    return True


def tiles_per_sequence(
    tokens: Int[np.ndarray, " samples"], tiles: Int[np.ndarray, " samples"], max_tokens: int
) -> int:
    """Tiles that go with `max_tokens` tokens of these samples, so that both fill up together."""
    if not tiles.any():
        return 0
    mean = max_tokens * float(tiles.sum()) / float(tokens.sum())
    return max(int(np.ceil(mean)), int(tiles.max()))


def fill(
    sequences: Sequence[Sequence[int]], sizes: Int[np.ndarray, " samples"], capacity: int
) -> float:
    """Share of the places of all sequences that hold something."""
    used = sum(int(sizes[place]) for sequence in sequences for place in sequence)
    return used / (capacity * len(sequences)) if sequences and capacity else 1.0
