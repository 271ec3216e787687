"""Prefill and decode compiled for a topology: the engine's own functions over shapes alone."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mis_jax.config import RunConfig
from mis_jax.generation.engine import decode_step, prefill, rows_bucket, slots_bucket
from mis_jax.model.config import InternVLConfig
from mis_jax.model.text import KVCache
from mis_jax.plan.memory import Compiled, compile_for
from mis_jax.plan.shape import QUESTION_TOKENS, sample_tiles
from mis_jax.plan.topology import Topology
from mis_jax.sharding import BATCH_AXES, FSDP_TENSOR, padded_vocab, parameter_shardings
from mis_jax.train.program import execution_on
from mis_jax.weights import parameters


@dataclass(frozen=True)
class GenerationShape:
    """Rows of `evaluation.samples`, spread over the devices; slots are those of the cache."""

    rows: int
    prompt: int
    slots: int
    tiles: int  # of a row


def generation_shape(config: RunConfig, model: InternVLConfig, mesh: Mesh) -> GenerationShape:
    """Questions about two images, answered at `evaluation.max_new_tokens`."""
    tiles = sample_tiles(config.data, model)
    prompt = slots_bucket(tiles * model.tokens_per_tile + QUESTION_TOKENS)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-rows_bucket(config.evaluation.samples) // shards) * shards
    slots = slots_bucket(prompt + config.evaluation.max_new_tokens)
    return GenerationShape(rows, prompt, slots, tiles)


def compile_prefill(
    topology: Topology, config: RunConfig, model: InternVLConfig, mesh: Mesh, shape: GenerationShape
) -> Compiled:
    """From embedded prompts to the first logits and a cache."""
    dtype = jnp.dtype(config.dtype.compute)
    how = _how(config, model, mesh)

    def run(values: Any, x: Any, lengths: Any):
        return prefill(parameters.build(model, values, **how), x, lengths)

    x = _rows(mesh, dtype, shape.rows, shape.prompt, model.text.hidden_size)
    lengths = _rows(mesh, jnp.int32, shape.rows)
    return compile_for(topology, jax.jit(run), _parameters(model, mesh, dtype), x, lengths)


def compile_decode(
    topology: Topology, config: RunConfig, model: InternVLConfig, mesh: Mesh, shape: GenerationShape
) -> Compiled:
    """One more token of every row; the cache is written in place."""
    dtype = jnp.dtype(config.dtype.compute)
    values = _parameters(model, mesh, dtype)
    how = _how(config, model, mesh)

    def run(values: Any, cache: Any, tokens: Any, lengths: Any):
        return decode_step(parameters.build(model, values, **how), tokens, lengths, cache)

    cache = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_cache_place(mesh, x.shape)),
        jax.eval_shape(lambda: KVCache.zeros(model.text, shape.rows, shape.slots, dtype)),
    )
    tokens = _rows(mesh, jnp.int32, shape.rows)
    jitted = jax.jit(run, donate_argnums=1)
    return compile_for(topology, jitted, values, cache, tokens, tokens)


def cache_bytes(config: RunConfig, model: InternVLConfig, shape: GenerationShape) -> float:
    """Keys and values of all rows."""
    text = model.text
    each = 2 * text.num_layers * text.num_kv_heads * text.head_dim
    return float(each * shape.rows * shape.slots * jnp.dtype(config.dtype.compute).itemsize)


def _how(config: RunConfig, model: InternVLConfig, mesh: Mesh) -> dict[str, Any]:
    return dict(
        compute_dtype=jnp.dtype(config.dtype.compute),
        execution=replace(execution_on(mesh, config), remat="none", drop_path=0.0),
        vocab_rows=padded_vocab(model.text.vocab_size),
    )


def _parameters(model: InternVLConfig, mesh: Mesh, dtype: Any) -> dict[str, Any]:
    abstract = parameters.abstract_model(model, vocab_rows=padded_vocab(model.text.vocab_size))
    places = parameter_shardings(abstract, mesh, FSDP_TENSOR)
    return {
        name: jax.ShapeDtypeStruct(value.shape, dtype, sharding=places[name])
        for name, value in parameters.flat(abstract).items()
    }


def _rows(mesh: Mesh, dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    )


def _cache_place(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Layers, rows, slots, heads, width: rows are split, and heads where they divide."""
    heads = "tensor" if shape[3] % mesh.shape["tensor"] == 0 else None
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, None, heads))
