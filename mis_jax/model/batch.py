"""`Batch`: the one seam between data, training and generation."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Bool, Float, Int, UInt8

#: Samples of a packed row, at most: kernels are made for so many.
MAX_SEGMENTS = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Right-padded rows of tokens, and the image tiles they refer to.

    A row owns `tiles.shape[0] // batch` consecutive tile slots: slots `r * n` to `(r + 1) * n - 1`
    belong to row `r`, its valid tiles come first and in the order of their image tokens. Rows can
    so be sharded over devices together with their tiles. `tiles` may have length 0.
    """

    input_ids: Int[Array, "batch length"]
    positions: Int[Array, "batch length"]  # restart at 0 with every packed sample
    segment_ids: Int[Array, "batch length"]  # 1, 2, ... per packed sample; 0 on padding
    loss_weights: Float[Array, "batch length"]  # weight of input_ids[b, t] as a target; unshifted
    tiles: UInt8[Array, "tiles size size 3"]  # RGB, 0 to 255; normalised on the device
    tile_mask: Bool[Array, " tiles"]  # False on slots without an image
