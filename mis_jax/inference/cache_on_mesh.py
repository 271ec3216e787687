"""The engine's cache, on one device or divided over a mesh."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mis_jax.model.config import TextConfig
from mis_jax.model.internvl import InternVL
from mis_jax.model.kv_cache import KVCache
from mis_jax.model.layers import Stack
from mis_jax.parallel.sharding import BATCH_AXES


def empty_cache(model: InternVL, rows: int, slots: int, dtype: jnp.dtype) -> KVCache:
    """A cache for a model, on the model's own devices."""
    text, mesh = model.config.text, mesh_of(model)
    stacked = isinstance(model.text.layers, Stack)
    cache = KVCache.zeros(text, rows, slots, dtype, stacked=stacked)
    if mesh is None:
        return cache
    return jax.device_put(cache, cache_place(mesh, text, stacked=stacked))


def cache_place(mesh: Mesh, text: TextConfig, *, stacked: bool) -> NamedSharding:
    """Rows of the cache are divided over data and fsdp, heads over tensor where they divide."""
    heads = "tensor" if text.num_kv_heads % mesh.shape["tensor"] == 0 else None
    layers = (None,) if stacked else ()
    return NamedSharding(mesh, PartitionSpec(*layers, BATCH_AXES, heads))


def mesh_of(model: InternVL) -> Mesh | None:
    """The mesh that a model is divided over."""
    sharding = model.text.embedding.get_value().sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None
