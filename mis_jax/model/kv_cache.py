"""Keys and values of earlier tokens, and the two ways in which new ones join them.

A slot of the cache belongs to one sequence and holds the token of position `p` at `p`. Positions
stand beside the head dimension, so that a head's keys lie together and attention is one batched
product without a copy.

Shape suffixes: B slots, K kv heads, S length of the cache, H head dim, T new tokens, N heads,
G slots of a chunk.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8

from mis_jax.model import xla_cpu
from mis_jax.model.attention import grouped_attention
from mis_jax.model.config import TextConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Tokens:
    """Keys or values as integers, each token of a head with a scale of its own."""

    codes: Int8[Array, "*layers slots kv_heads length head_dim"]
    scales: Float[Array, "*layers slots kv_heads length 1"]

    @classmethod
    def of(cls, x: Float[Array, "*axes head_dim"]) -> "Int8Tokens":
        scales = jnp.abs(x.astype(jnp.float32)).max(-1, keepdims=True) / 127
        codes = jnp.round(x.astype(jnp.float32) / jnp.where(scales > 0, scales, 1))
        return cls(codes.astype(jnp.int8), scales)


#: Of a layer, or of all layers with a leading axis: [slots, kv_heads, length, head_dim].
Tokens = jax.Array | Int8Tokens
#: One for each layer, or one of all layers where layers are scanned.
Layers = tuple[Tokens, ...] | Tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values in a float dtype, or as int8 with float32 scales."""

    keys: Layers
    values: Layers

    @classmethod
    def zeros(
        cls,
        config: TextConfig,
        slots: int,
        length: int,
        dtype: jax.typing.DTypeLike,
        *,
        stacked: bool = False,
    ) -> "KVCache":
        shape = (slots, config.num_kv_heads, length, config.head_dim)

        def tokens(shape: tuple[int, ...]) -> Tokens:
            if jnp.dtype(dtype) == jnp.int8:
                scales = jnp.zeros((*shape[:-1], 1), jnp.float32)
                return Int8Tokens(jnp.zeros(shape, jnp.int8), scales)
            return jnp.zeros(shape, dtype)

        def layers() -> Layers:
            if stacked:
                return tokens((config.num_layers, *shape))
            return tuple(tokens(shape) for _ in range(config.num_layers))

        return cls(layers(), layers())

    @property
    def length(self) -> int:
        return jax.tree.leaves(self.keys)[0].shape[-2]

    def layer(self, layer) -> tuple[Tokens, Tokens]:
        return _of_layer(self.keys, layer), _of_layer(self.values, layer)

    def with_layer(self, layer, keys: Tokens, values: Tokens) -> "KVCache":
        return KVCache(_put(self.keys, layer, keys), _put(self.values, layer, values))


def _of_layer(layers: Layers, layer) -> Tokens:
    if isinstance(layers, tuple):
        return layers[layer]
    return jax.tree.map(lambda all: all[layer], layers)


def _put(layers: Layers, layer, new: Tokens) -> Layers:
    if isinstance(layers, tuple):
        return (*layers[:layer], new, *layers[layer + 1 :])
    return jax.tree.map(
        lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, layer, 0), layers, new
    )


def _stored(new: jax.Array, like: Tokens) -> Tokens:
    """New tokens in the form of those that are there."""
    return Int8Tokens.of(new) if isinstance(like, Int8Tokens) else new.astype(like.dtype)


def attend_to(query, keys: Tokens, values: Tokens, mask):
    """`grouped_attention`; scales of integers are applied to logits and weights, not to tokens."""
    if isinstance(keys, Int8Tokens):
        assert isinstance(values, Int8Tokens)
        return grouped_attention(
            query,
            keys.codes.astype(query.dtype),
            values.codes.astype(query.dtype),
            mask,
            key_scale=keys.scales[..., 0],
            value_scale=values.scales[..., 0],
        )
    assert not isinstance(values, Int8Tokens)
    return grouped_attention(query, keys, values, mask)


class CacheUpdate(Protocol):
    """What the decoder's attention does with its new keys and values when there is a cache."""

    def attend(
        self,
        layer: Int[Array, ""] | int,
        query: Float[Array, "batch length heads head_dim"],
        key: Float[Array, "batch length kv_heads head_dim"],
        value: Float[Array, "batch length kv_heads head_dim"],
    ) -> tuple[Self, Float[Array, "batch length heads head_dim"]]:
        """Write the new tokens, then let them look at themselves and all before them."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeUpdate:
    """One more token in every slot, at `positions`; one beyond the cache is not written."""

    cache: KVCache
    positions: Int[Array, " slots"]

    def attend(self, layer, query, key, value):
        def write(slots_BKSH, new_BKH):
            on_cpu = partial(xla_cpu.write_tokens, _write)
            return jax.lax.platform_dependent(
                slots_BKSH, new_BKH, self.positions, cpu=on_cpu, default=_write
            )

        keys_BKSH, values_BKSH = self.cache.layer(layer)
        keys_BKSH = jax.tree.map(write, keys_BKSH, _stored(key[:, 0], keys_BKSH))
        values_BKSH = jax.tree.map(write, values_BKSH, _stored(value[:, 0], values_BKSH))
        seen_BS = jnp.arange(self.cache.length) <= self.positions[:, None]
        out = attend_to(query, keys_BKSH, values_BKSH, seen_BS[:, None, None])
        return replace(self, cache=self.cache.with_layer(layer, keys_BKSH, values_BKSH)), out


def _write(slots_BKSH, new_BKH, positions_B):
    def write(slot_KSH, new_KH, position):
        return slot_KSH.at[:, position].set(new_KH, mode="drop")

    return jax.vmap(write)(slots_BKSH, new_BKH, positions_B)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillUpdate:
    """A stretch of a prompt in one slot of each group; slots are divided into groups in order.

    Groups are what a mesh divides slots into, so that no device writes into another's slots. A
    group with nothing to write has `valid` False.
    """

    cache: KVCache
    slot: Int[Array, " groups"]  # within its group
    start: Int[Array, " groups"]  # slot of the chunk's first token
    valid: Bool[Array, " groups"]

    def attend(self, layer, query, key, value):
        groups, length = query.shape[:2]

        def write(slots_BKSH, new_TKH, slot, start, valid):
            new = new_TKH.swapaxes(0, 1)[None]
            old = jax.lax.dynamic_slice(slots_BKSH, (slot, 0, start, 0), new.shape)
            slots_BKSH = jax.lax.dynamic_update_slice(
                slots_BKSH, jnp.where(valid, new, old), (slot, 0, start, 0)
            )
            return slots_BKSH, jax.lax.dynamic_index_in_dim(slots_BKSH, slot, keepdims=False)

        def written(slots: jax.Array, new: jax.Array):
            grouped = slots.reshape(groups, -1, *slots.shape[1:])
            grouped, own = jax.vmap(write)(grouped, new, self.slot, self.start, self.valid)
            return grouped.reshape(slots.shape), own

        def joined(slots: Tokens, new: jax.Array) -> tuple[Tokens, Tokens]:
            pairs = jax.tree.map(written, slots, _stored(new, slots))
            return jax.tree.transpose(jax.tree.structure(slots), jax.tree.structure((0, 0)), pairs)

        keys_BKSH, values_BKSH = self.cache.layer(layer)
        keys_BKSH, own_keys_GKSH = joined(keys_BKSH, key)
        values_BKSH, own_values_GKSH = joined(values_BKSH, value)
        places_GT = self.start[:, None] + jnp.arange(length)
        seen_GTS = jnp.arange(self.cache.length) <= places_GT[..., None]
        out = attend_to(query, own_keys_GKSH, own_values_GKSH, seen_GTS[:, None])
        return replace(self, cache=self.cache.with_layer(layer, keys_BKSH, values_BKSH)), out
