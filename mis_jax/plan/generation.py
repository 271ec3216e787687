"""Prefill and decode compiled for a topology: the engine's own functions over shapes alone."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mis_jax.checkpoint import nnx_state
from mis_jax.config import RunConfig
from mis_jax.inference.engine import CHUNKS, POOL_TILES
from mis_jax.inference.model_runner import (
    Chunk,
    SamplingState,
    cache_bucket,
    cache_place,
    decode_step,
    power_of_two,
    prefill_chunk,
    sample_next,
)
from mis_jax.model.config import InternVLConfig
from mis_jax.model.kv_cache import KVCache
from mis_jax.parallel.sharding import BATCH_AXES, FSDP_TENSOR, padded_vocab, parameter_shardings
from mis_jax.plan.compile import Compiled, compile_for
from mis_jax.plan.shape import QUESTION_TOKENS, sample_tiles
from mis_jax.plan.topology import Topology
from mis_jax.train.compiled_step import execution_on


@dataclass(frozen=True)
class GenerationShape:
    """Slots of `evaluation.samples`, spread over the devices.

    Prompts are read `chunk` tokens at a time, one in each of `groups` groups of slots.
    """

    slots: int
    prompt: int
    cache_length: int
    tiles: int  # of a slot
    groups: int
    chunk: int


def generation_shape(config: RunConfig, model: InternVLConfig, mesh: Mesh) -> GenerationShape:
    """Questions about two images, answered at `evaluation.max_new_tokens`."""
    tiles = sample_tiles(config.data, model)
    prompt = cache_bucket(tiles * model.tokens_per_tile + QUESTION_TOKENS)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    slots = -(-power_of_two(config.evaluation.samples) // shards) * shards
    cache_length = cache_bucket(prompt + config.evaluation.max_new_tokens)
    return GenerationShape(slots, prompt, cache_length, tiles, shards, min(CHUNKS[-1], prompt))


def compile_prefill(
    topology: Topology, config: RunConfig, model: InternVLConfig, mesh: Mesh, shape: GenerationShape
) -> Compiled:
    """The last chunk of a prompt in every group of slots: its first token, and the cache."""
    dtype = jnp.dtype(config.dtype.compute)
    groups, length = shape.groups, shape.chunk
    how = _how(config, model, mesh)

    def run(values: Any, cache: KVCache, pool: Any, chunk: Chunk):
        built = nnx_state.build(model, values, **how)
        logits, cache = prefill_chunk(built, cache, pool, chunk)
        return sample_next(logits, chunk.settings, jnp.bool_(False)), cache

    tiles = max(POOL_TILES, groups * shape.tiles)
    pool = _whole(mesh, dtype, tiles, model.tokens_per_tile, model.text.hidden_size)
    number = _slots(mesh, jnp.int32, groups)
    tokens = _slots(mesh, jnp.int32, groups, length)
    valid = _slots(mesh, jnp.bool_, groups)
    chunk = Chunk(tokens, tokens, number, number, valid, number, _settings(mesh, groups))
    jitted = jax.jit(run, donate_argnums=1)
    values, cache = _parameters(model, mesh, dtype), _cache(mesh, model, shape, dtype)
    return compile_for(topology, jitted, values, cache, pool, chunk)


def compile_decode(
    topology: Topology, config: RunConfig, model: InternVLConfig, mesh: Mesh, shape: GenerationShape
) -> Compiled:
    """One more token of every slot; the cache is written in place."""
    dtype = jnp.dtype(config.dtype.compute)
    how = _how(config, model, mesh)

    def run(values: Any, cache: KVCache, tokens: Any, lengths: Any, active: Any):
        built = nnx_state.build(model, values, **how)
        return decode_step(built, tokens, lengths, active, cache)

    tokens, active = _slots(mesh, jnp.int32, shape.slots), _slots(mesh, jnp.bool_, shape.slots)
    jitted = jax.jit(run, donate_argnums=1)
    values, cache = _parameters(model, mesh, dtype), _cache(mesh, model, shape, dtype)
    return compile_for(topology, jitted, values, cache, tokens, tokens, active)


def cache_bytes(config: RunConfig, model: InternVLConfig, shape: GenerationShape) -> float:
    """Keys and values of all slots."""
    text = model.text
    each = 2 * text.num_layers * text.num_kv_heads * text.head_dim
    return float(each * shape.slots * shape.cache_length * jnp.dtype(config.dtype.compute).itemsize)


def _how(config: RunConfig, model: InternVLConfig, mesh: Mesh) -> dict[str, Any]:
    return dict(
        compute_dtype=jnp.dtype(config.dtype.compute),
        execution=replace(execution_on(mesh, config), remat="none", drop_path=0.0),
        vocab_rows=padded_vocab(model.text.vocab_size),
    )


def _parameters(model: InternVLConfig, mesh: Mesh, dtype: Any) -> dict[str, Any]:
    abstract = nnx_state.abstract_model(model, vocab_rows=padded_vocab(model.text.vocab_size))
    places = parameter_shardings(abstract, mesh, FSDP_TENSOR)
    return {
        name: jax.ShapeDtypeStruct(value.shape, dtype, sharding=places[name])
        for name, value in nnx_state.flat(abstract).items()
    }


def _slots(mesh: Mesh, dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    )


def _whole(mesh: Mesh, dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def _settings(mesh: Mesh, slots: int) -> SamplingState:
    number, real = _slots(mesh, jnp.int32, slots), _slots(mesh, jnp.float32, slots)
    name = _slots(mesh, jnp.uint32, slots)
    return SamplingState(real, real, number, name, name, number)


def _cache(mesh: Mesh, model: InternVLConfig, shape: GenerationShape, dtype: Any) -> KVCache:
    """Layers are scanned here: they compile once, and lie no differently than one by one."""
    made = jax.eval_shape(
        lambda: KVCache.zeros(model.text, shape.slots, shape.cache_length, dtype, stacked=True)
    )
    place = cache_place(mesh, model.text, stacked=True)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), made)
