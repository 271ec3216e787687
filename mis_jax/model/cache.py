"""Keys and values of earlier tokens, and the two ways in which new ones join them.

A row of the cache belongs to one answer; slot `s` holds the token at place `s` of that row. Slots
stand beside the head dimension, so that a head's keys lie together and attention is one batched
product without a copy.

Shape suffixes: R rows, K kv heads, S slots, H head dim, T new tokens, N heads, G rows of a chunk.
"""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mis_jax.model.attention import grouped_attention
from mis_jax.model.config import TextConfig

#: One array a layer, or one of all layers with a leading axis where layers are scanned.
Layers = tuple[jax.Array, ...] | jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Each array is [rows, kv_heads, slots, head_dim]."""

    keys: Layers
    values: Layers

    @classmethod
    def zeros(
        cls, config: TextConfig, rows: int, slots: int, dtype: jnp.dtype, *, stacked: bool = False
    ) -> "KVCache":
        shape = (rows, config.num_kv_heads, slots, config.head_dim)

        def zeros() -> Layers:
            if stacked:
                return jnp.zeros((config.num_layers, *shape), dtype)
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

        return cls(zeros(), zeros())

    @property
    def slots(self) -> int:
        return self.keys[0].shape[2]

    def with_layer(self, layer, keys: jax.Array, values: jax.Array) -> "KVCache":
        return KVCache(_put(self.keys, layer, keys), _put(self.values, layer, values))


def _put(layers: Layers, layer, new: jax.Array) -> Layers:
    if isinstance(layers, tuple):
        return (*layers[:layer], new, *layers[layer + 1 :])
    return jax.lax.dynamic_update_index_in_dim(layers, new, layer, 0)


class Growing(Protocol):
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
class NextToken:
    """One more token in every row, at `slots`; a row whose slot does not exist keeps its own."""

    cache: KVCache
    slots: Int[Array, " rows"]

    def attend(self, layer, query, key, value):
        def written(rows_RKSH, new_R1KH):
            new_RKH = new_R1KH[:, 0].astype(rows_RKSH.dtype)
            return jax.lax.platform_dependent(
                rows_RKSH, new_RKH, self.slots, cpu=_write_by_choice, default=_write_at_once
            )

        keys_RKSH = written(self.cache.keys[layer], key)
        values_RKSH = written(self.cache.values[layer], value)
        seen_RS = jnp.arange(self.cache.slots) <= self.slots[:, None]
        out = grouped_attention(query, keys_RKSH, values_RKSH, seen_RS[:, None, None])
        return replace(self, cache=self.cache.with_layer(layer, keys_RKSH, values_RKSH)), out


def _write_at_once(rows_RKSH, new_RKH, slots_R):
    def write(row_KSH, new_KH, slot):
        return row_KSH.at[:, slot].set(new_KH, mode="drop")

    return jax.vmap(write)(rows_RKSH, new_RKH, slots_R)


def _write_by_choice(rows_RKSH, new_RKH, slots_R):
    """On a CPU, XLA would scatter into a float32 copy of a bfloat16 cache; this passes it once."""
    if rows_RKSH.dtype != jnp.bfloat16:
        return _write_at_once(rows_RKSH, new_RKH, slots_R)
    here_RS = jnp.arange(rows_RKSH.shape[2]) == slots_R[:, None]
    return jnp.where(here_RS[:, None, :, None], new_RKH[:, :, None], rows_RKSH)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NextChunk:
    """A stretch of a prompt in one row of each group; rows are divided into groups in order.

    Groups are what a mesh divides rows into, so that no device writes into another's rows. A group
    with nothing to write has `valid` False.
    """

    cache: KVCache
    row: Int[Array, " groups"]  # within its group
    start: Int[Array, " groups"]  # slot of the chunk's first token
    valid: Bool[Array, " groups"]

    def attend(self, layer, query, key, value):
        groups, length = query.shape[:2]

        def write(rows_RKSH, new_TKH, row, start, valid):
            new = new_TKH.swapaxes(0, 1)[None].astype(rows_RKSH.dtype)
            old = jax.lax.dynamic_slice(rows_RKSH, (row, 0, start, 0), new.shape)
            rows_RKSH = jax.lax.dynamic_update_slice(
                rows_RKSH, jnp.where(valid, new, old), (row, 0, start, 0)
            )
            return rows_RKSH, jax.lax.dynamic_index_in_dim(rows_RKSH, row, keepdims=False)

        def written(layers: Layers, new):
            rows = layers[layer]
            grouped = rows.reshape(groups, -1, *rows.shape[1:])
            grouped, own = jax.vmap(write)(grouped, new, self.row, self.start, self.valid)
            return grouped.reshape(rows.shape), own

        keys_RKSH, own_keys_GKSH = written(self.cache.keys, key)
        values_RKSH, own_values_GKSH = written(self.cache.values, value)
        places_GT = self.start[:, None] + jnp.arange(length)
        seen_GTS = jnp.arange(self.cache.slots) <= places_GT[..., None]
        out = grouped_attention(query, own_keys_GKSH, own_values_GKSH, seen_GTS[:, None])
        return replace(self, cache=self.cache.with_layer(layer, keys_RKSH, values_RKSH)), out
