"""Examples of different sizes -> one `Batch` of a few static shapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from mis_jax.model.batch import Batch

LossReduction = Literal["token", "sample", "square"]


@dataclass(frozen=True)
class Example:
    """One conversation as the model sees it."""

    id: str
    input_ids: Int32[np.ndarray, " length"]
    loss_mask: Bool[np.ndarray, " length"]  # beside input_ids, unshifted
    tiles: UInt8[np.ndarray, "tiles size size 3"]
    tiles_per_image: tuple[int, ...]


def loss_weight(answer_tokens: int, reduction: LossReduction) -> float:
    """Weight of each answer token of a sample with so many (InternVL's `loss_reduction`).

    'token' counts every token alike, 'sample' every sample, 'square' lies between (1 / sqrt(n)).
    """
    if answer_tokens == 0:
        return 0.0
    return {"token": 1.0, "sample": 1 / answer_tokens, "square": answer_tokens**-0.5}[reduction]


def collate(
    examples: Sequence[Example],
    *,
    length: int,
    tiles_per_row: int,
    image_size: int,
    pad_id: int,
    reduction: LossReduction = "token",
) -> Batch:
    """Right-pad one example a row. Raises ValueError for an example that does not fit."""
    rows = len(examples)
    ids = np.full((rows, length), pad_id, np.int32)
    positions, segments = np.zeros_like(ids), np.zeros_like(ids)
    weights = np.zeros((rows, length), np.float32)
    tiles = np.zeros((rows, tiles_per_row, image_size, image_size, 3), np.uint8)
    tile_mask = np.zeros((rows, tiles_per_row), bool)
    for row, example in enumerate(examples):
        n, t = len(example.input_ids), len(example.tiles)
        if n > length or t > tiles_per_row:
            raise ValueError(
                f"sample {example.id}: {n} tokens and {t} tiles do not fit a row of {length} "
                f"tokens and {tiles_per_row} tiles; raise data.max_length or lower data.max_tiles"
            )
        ids[row, :n] = example.input_ids
        positions[row, :n] = np.arange(n)
        segments[row, :n] = 1
        weight = loss_weight(int(example.loss_mask.sum()), reduction)
        weights[row, :n] = example.loss_mask * np.float32(weight)
        tiles[row, :t] = example.tiles
        tile_mask[row, :t] = True
    fields: dict[str, Any] = dict(  # host arrays, for whoever puts them on devices
        input_ids=ids,
        positions=positions,
        segment_ids=segments,
        loss_weights=weights,
        tiles=tiles.reshape(-1, image_size, image_size, 3),
        tile_mask=tile_mask.reshape(-1),
    )
    return Batch(**fields)


def length_bucket(length: int, max_length: int) -> int:
    """The smallest of max_length, max_length / 2, ... that holds `length`: few static shapes."""
    bucket = max_length
    while bucket // 2 >= max(length, 1):
        bucket //= 2
    return bucket


def tiles_bucket(tiles: int) -> int:
    """0, or the next power of two."""
    return 1 << (tiles - 1).bit_length() if tiles else 0
