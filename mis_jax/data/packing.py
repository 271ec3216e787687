"""Which samples share a row: tokens and tiles packed together into rows of one fixed shape.

A packing is a function of the sizes of the samples and of their order alone, made before training.
So every host knows every row, a run goes on at any step without looking at what came before, and
the order does not depend on how many processes read it.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from mis_jax.model.batch import MAX_SEGMENTS

#: Samples that a row is chosen from: more fill rows better and move samples further.
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
    """Places of the samples of each row; every sample is in one row.

    A row begins with the oldest sample that waits and takes, of the next `look_ahead`, the one that
    uses most of what the row has most of left, until none fits (the dot-product rule of vector bin
    packing: Panigrahy et al. 2011). Then samples are exchanged for waiting ones while that fills
    the row better. Every sample must fit a row by itself.
    """
    assert not len(tokens) or (tokens.max() <= max_tokens and tiles.max() <= max_tiles)
    shares = np.stack([tokens / max_tokens, tiles / max(max_tiles, 1)], axis=1)
    waiting: list[int] = []
    upcoming, rows = 0, []
    while waiting or upcoming < len(tokens):
        row: list[int] = []
        while True:
            while len(waiting) < look_ahead and upcoming < len(tokens):
                waiting.append(upcoming)
                upcoming += 1
            if not row:
                row.append(waiting.pop(0))
            left = 1 - shares[row].sum(axis=0)
            if not (_add(row, waiting, left, shares) or _exchange(row, waiting, left, shares)):
                break
        rows.append(row)
    return rows


def _add(row: list[int], waiting: list[int], left: np.ndarray, shares: np.ndarray) -> bool:
    """Move the waiting sample that suits what is left best into the row; False if none fits."""
    if len(row) == MAX_SEGMENTS:
        return False
    candidates = shares[waiting]
    fits = (candidates <= left + _ROUNDING).all(axis=1)
    if not fits.any():
        return False
    row.append(waiting.pop(int(np.argmax(np.where(fits, candidates @ left, -1)))))
    return True


def _exchange(row: list[int], waiting: list[int], left: np.ndarray, shares: np.ndarray) -> bool:
    """Swap the pair that leaves least of the row empty; False if none leaves less than now.

    The oldest sample of the row stays.
    """
    if len(row) < 2 or not waiting:
        return False
    after = (left + shares[row[1:]])[:, None] - shares[waiting]  # [of the row, waiting, 2]
    gain = np.where((after >= -_ROUNDING).all(-1), left.sum() - after.sum(-1), 0)
    here, there = np.unravel_index(np.argmax(gain), gain.shape)
    if gain[here, there] <= 1e-6:
        return False
    row[1 + here], waiting[there] = waiting[there], row[1 + here]
    waiting.sort()
    return True


def tiles_of_a_row(
    tokens: Int[np.ndarray, " samples"], tiles: Int[np.ndarray, " samples"], max_tokens: int
) -> int:
    """Tiles that go with `max_tokens` tokens of these samples, so that both fill up together."""
    if not tiles.any():
        return 0
    mean = max_tokens * float(tiles.sum()) / float(tokens.sum())
    return max(int(np.ceil(mean)), int(tiles.max()))


def fill(rows: Sequence[Sequence[int]], sizes: Int[np.ndarray, " samples"], capacity: int) -> float:
    """Share of the places of all rows that hold something."""
    used = sum(int(sizes[place]) for row in rows for place in row)
    return used / (capacity * len(rows)) if rows and capacity else 1.0
