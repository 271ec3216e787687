"""Examples of different sizes -> one `Batch` of a few static shapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int32, UInt8

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


def loss_shares(
    weights: Float[np.ndarray, " sequences"], group: int
) -> Float[np.ndarray, " sequences"]:
    """1 / (sum of the loss weights of its group) of each sequence, 0 in a group without loss.

    Multiplied by them, every group weighs 1, and a step, which divides by the sum of all weights,
    takes the mean of the means of its groups.
    """
    sums = weights.reshape(-1, group).sum(axis=1).repeat(group)
    return np.divide(1, sums, out=np.zeros_like(sums), where=sums > 0)


def collate(
    sequences: Sequence[Sequence[Example]],
    *,
    length: int,
    tiles_per_sequence: int,
    image_size: int,
    pad_id: int,
    reduction: LossReduction = "token",
    shares: Float[np.ndarray, " sequences"] | None = None,
) -> Batch:
    """Right-padded sequences of the examples packed into each; a sequence may be empty.

    Segments count from 1 in every sequence and positions restart with each. The loss weights of a
    sequence are multiplied by its entry in `shares`. Raises ValueError for a sequence that does not
    fit.
    """
    shape = len(sequences), length
    ids = np.full(shape, pad_id, np.int32)
    positions, segments = np.zeros_like(ids), np.zeros_like(ids)
    weights = np.zeros(shape, np.float32)
    tiles = np.zeros((len(sequences), tiles_per_sequence, image_size, image_size, 3), np.uint8)
    tile_mask = np.zeros((len(sequences), tiles_per_sequence), bool)
    for sequence, examples in enumerate(sequences):
        start = tile = 0
        for segment, example in enumerate(examples, start=1):
            end, last_tile = start + len(example.input_ids), tile + len(example.tiles)
            if end > length or last_tile > tiles_per_sequence:
                raise ValueError(
                    f"sample {example.id}: {end} tokens and {last_tile} tiles do not fit a "
                    f"sequence of {length} tokens and {tiles_per_sequence} tiles; raise "
                    "data.max_length or lower data.max_tiles"
                )
            here = sequence, slice(start, end)
            ids[here] = example.input_ids
            positions[here] = np.arange(end - start)
            segments[here] = segment
            weight = loss_weight(int(example.loss_mask.sum()), reduction)
            weights[here] = example.loss_mask * np.float32(weight)
            tiles[sequence, tile:last_tile] = example.tiles
            tile_mask[sequence, tile:last_tile] = True
            start, tile = end, last_tile
    if shares is not None:
        weights *= shares[:, None].astype(np.float32)
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
