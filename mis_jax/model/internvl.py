"""InternVL: vision tower, pixel shuffle, projector, merge by position, decoder.

Shape suffixes: B batch, T length, I tiles, P image tokens of a tile, D decoder width.
Source: OpenGVLab/InternVL `modeling_internvl_chat.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from mis_jax.model.attention import row_index, segment_mask
from mis_jax.model.batch import Batch
from mis_jax.model.config import InternVLConfig
from mis_jax.model.layers import LayerNorm, Linear, Remat
from mis_jax.model.text import TextDecoder
from mis_jax.model.vision import VisionTower

_PROJECTOR_EPS = 1e-5  # torch's LayerNorm default, unlike the tower's 1e-6


class Projector(nnx.Module):
    """LayerNorm, Linear, exact GELU, Linear: shuffled patches to decoder width."""

    def __init__(self, config: InternVLConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        wide, width = config.projector_input_size, config.text.hidden_size
        self.norm = LayerNorm(wide, eps=_PROJECTOR_EPS, axes=("projector",), dtype=dtype)
        linear = partial(Linear, bias=True, dtype=dtype, rngs=rngs)
        self.first = linear(wide, width, axes=("projector", "embed"))
        self.second = linear(width, width, axes=(None, "embed"))

    def __call__(self, x: Float[Array, "tiles tokens wide"]) -> Float[Array, "tiles tokens width"]:
        return self.second(jax.nn.gelu(self.first(self.norm(x)), approximate=False))


class InternVL(nnx.Module):
    """The whole vision-language model.

    `dtype` is that of the parameters, `compute_dtype` that of activations. `remat` trades compute
    for memory in the backward pass of both towers; `unroll` writes the layers out.
    """

    def __init__(
        self,
        config: InternVLConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        compute_dtype: jnp.dtype | None = None,
        remat: Remat = "none",
        unroll: bool = False,
    ):
        self.vision = VisionTower(config.vision, dtype=dtype, rngs=rngs)
        self.projector = Projector(config, dtype=dtype, rngs=rngs)
        self.text = TextDecoder(config.text, dtype=dtype, rngs=rngs)
        self.config = config
        self.compute_dtype = jnp.dtype(compute_dtype or dtype)
        self.remat: Remat = remat
        self.unroll = unroll

    def __call__(self, batch: Batch) -> Float[Array, "batch length vocab"]:
        """Next-token logits at every position, float32."""
        return self.text.logits(self.hidden(batch))

    def hidden(self, batch: Batch) -> Float[Array, "batch length width"]:
        """Decoder output after the final norm; `text.logits` turns it into logits."""
        index = row_index(batch.segment_ids)
        hidden, _, _ = self.text(
            self.embed(batch),
            positions=batch.positions,
            lengths=row_lengths(batch),
            mask=segment_mask(batch.segment_ids, batch.segment_ids, index, index),
            remat=self.remat,
            unroll=self.unroll,
        )
        return hidden

    def embed(self, batch: Batch) -> Float[Array, "batch length width"]:
        """Token embeddings with the image features in the places of the image tokens."""
        x_BTD = self.text.embed(batch.input_ids, self.compute_dtype)
        if batch.tiles.shape[0] == 0:
            return x_BTD
        features_IPD = self.encode_images(batch.tiles)
        is_image_BT = batch.input_ids == self.config.image_token_id
        return merge(x_BTD, features_IPD, is_image_BT)

    def encode_images(
        self, tiles: UInt8[Array, "tiles size size 3"]
    ) -> Float[Array, "tiles tokens width"]:
        """Vision tower, pixel shuffle and projector."""
        features = self.vision(
            tiles,
            dtype=self.compute_dtype,
            select_layer=self.config.select_layer,
            remat=self.remat,
            unroll=self.unroll,
        )
        factor = self.config.shuffle_factor
        return self.projector(pixel_shuffle(features, factor, self.config.pixel_shuffle))


def pixel_shuffle(
    x: Float[Array, "tiles patches width"], factor: int, version: str = "v2"
) -> Float[Array, "tiles tokens wide"]:
    """Merge `factor` x `factor` neighbouring patches into one token, channels side by side.

    v2 keeps tokens row by row; v1 (InternVL 1.x) leaves them column by column.
    """
    tiles, patches, width = x.shape
    side = round(patches**0.5)
    x = x.reshape(tiles, side // factor, factor, side // factor, factor, width)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return x.transpose(order).reshape(tiles, patches // factor**2, factor**2 * width)


def merge(
    x_BTD: Float[Array, "batch length width"],
    features_IPD: Float[Array, "tiles tokens width"],
    is_image_BT: Bool[Array, "batch length"],
) -> Float[Array, "batch length width"]:
    """Put the n-th image feature of a row into the place of its n-th image token."""
    batch, _, width = x_BTD.shape
    row_features = features_IPD.reshape(batch, -1, width)
    order_BT = jnp.cumsum(is_image_BT, axis=1) - 1
    gathered_BTD = jnp.take_along_axis(row_features, order_BT[..., None], axis=1, mode="clip")
    return jnp.where(is_image_BT[..., None], gathered_BTD.astype(x_BTD.dtype), x_BTD)


def row_lengths(batch: Batch) -> Int[Array, " batch"]:
    """Real length of every row: its longest sample, padding not counted."""
    return jnp.max(jnp.where(batch.segment_ids > 0, batch.positions + 1, 0), axis=1)
