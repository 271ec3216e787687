"""InternVL: vision tower, pixel shuffle, projector, merge by position, decoder.

Shape suffixes: B batch, T length, I tiles, P image tokens of a tile, D decoder width.
Source: OpenGVLab/InternVL `modeling_internvl_chat.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mis_jax.model.batch import Batch
from mis_jax.model.config import InternVLConfig
from mis_jax.model.execution import PLAIN, Execution
from mis_jax.model.layers import LayerNorm, Linear
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

    `dtype` is that of the parameters, `compute_dtype` that of activations; `execution` says how
    it is run, `vocab_rows` how many rows the tables of the vocabulary have.
    """

    def __init__(
        self,
        config: InternVLConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        compute_dtype: jnp.dtype | None = None,
        execution: Execution = PLAIN,
        vocab_rows: int | None = None,
    ):
        self.vision = VisionTower(config.vision, dtype=dtype, rngs=rngs)
        self.projector = Projector(config, dtype=dtype, rngs=rngs)
        self.text = TextDecoder(config.text, dtype=dtype, rngs=rngs, vocab_rows=vocab_rows)
        self.config = config
        self.compute_dtype = jnp.dtype(compute_dtype or dtype)
        self.execution = execution

    def __call__(self, batch: Batch) -> Float[Array, "batch length vocab"]:
        """Next-token logits at every position, float32."""
        return self.text.logits(self.hidden(batch))

    def hidden(
        self, batch: Batch, key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch length width"]:
        """Decoder output after the final norm; `text.logits` turns it into logits.

        With a `key` the vision tower drops branches as `execution.drop_path` says.
        """
        hidden, _, _ = self.text(
            self.embed(batch, key),
            positions=batch.positions,
            lengths=row_lengths(batch),
            segment_ids=batch.segment_ids,
            execution=self.execution,
        )
        return hidden

    def embed(
        self, batch: Batch, key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch length width"]:
        """Token embeddings with the image features in the places of the image tokens."""
        constrain = self.execution.constrain
        x_BTD = self.text.embed(batch.input_ids, self.compute_dtype, self.execution)
        if batch.tiles.shape[0] == 0:
            return x_BTD
        features_IPD = self.encode_images(batch.tiles, key)
        # Every part of a sequence needs all tiles of its rows.
        features_IPD = constrain(features_IPD, "row_tiles", None, None)
        is_image_BT = batch.input_ids == self.config.image_token_id
        return constrain(merge(x_BTD, features_IPD, is_image_BT), "rows", "length", None)

    def encode_images(
        self, tiles: UInt8[Array, "tiles size size 3"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "tiles tokens width"]:
        """Vision tower, pixel shuffle and projector."""
        features = self.vision(
            self.execution.constrain(tiles, "tiles", None, None, None),
            dtype=self.compute_dtype,
            select_layer=self.config.select_layer,
            execution=self.execution,
            key=key,
        )
        factor = self.config.shuffle_factor
        shuffled = pixel_shuffle(features, factor, self.config.pixel_shuffle)
        return self.projector(shuffled)


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
