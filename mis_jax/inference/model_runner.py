"""What the engine runs on the device: encode tiles, prefill a chunk, decode some tokens.

    tiles --encode--> pool of image features --+
                                               +--prefill--> cache, first token
    ids of a chunk of some prompts ------------+
    cache, newest token of every row --decode--> tokens

Each is one jitted function that compiles for few shapes: the number of rows and of tiles in the
pool are fixed, chunks come in six lengths and caches in the sizes of `slots_bucket`. The model
comes in as (structure, weights), so that new weights need no new compilation.

Dynamic NTK: a query uses the base of its row's length so far, and a key keeps the base it was
written with, as in transformers.

Shape suffixes: R rows, G groups of rows, C length of a chunk, D decoder width, V vocabulary.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from mis_jax.inference.requests import MAX_TOP_LOGPROBS
from mis_jax.inference.sampling import row_keys, sample
from mis_jax.model.config import TextConfig
from mis_jax.model.internvl import InternVL
from mis_jax.model.kv_cache import DecodeUpdate, KVCache, PrefillUpdate
from mis_jax.model.layers import Stack
from mis_jax.parallel.sharding import BATCH_AXES

DECODE_STEPS = 32  # tokens of a row in one call, at most
MIN_SLOTS = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingState:
    """How the next token of every row is chosen. `made` counts the tokens before it."""

    temperature: Float[Array, " rows"]
    top_p: Float[Array, " rows"]
    top_k: Int[Array, " rows"]
    seed: UInt32[Array, " rows"]
    stream: UInt32[Array, " rows"]
    made: Int[Array, " rows"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Where every row stands: its newest token is chosen but not yet in the cache."""

    last: Int[Array, " rows"]
    lengths: Int[Array, " rows"]  # tokens in the cache
    active: Bool[Array, " rows"]
    left: Int[Array, " rows"]  # tokens it may still make
    settings: SamplingState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chosen:
    """A token of every row; log probabilities only where they are asked for, else zeros."""

    token: Int[Array, " rows"]
    logprob: Float[Array, " rows"]
    top_ids: Int[Array, "rows alternatives"]
    top_logprobs: Float[Array, "rows alternatives"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunk:
    """A stretch of one prompt in each group of rows."""

    ids: Int[Array, "groups length"]
    features: Int[Array, "groups length"]  # place in the pool of an image token's feature, or -1
    row: Int[Array, " groups"]  # within its group
    start: Int[Array, " groups"]  # place of the first token in the prompt
    valid: Bool[Array, " groups"]
    prompt: Int[Array, " groups"]  # tokens of the whole prompt
    settings: SamplingState


class Structure:
    """What a model is beside its arrays; hashed once, as every call of a jitted function asks."""

    def __init__(self, graph, tree):
        self._parts = (graph, tree)
        self._hash = hash(self._parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other) -> bool:
        return self is other or (isinstance(other, Structure) and self._parts == other._parts)

    def model(self, weights: tuple[jax.Array, ...]) -> InternVL:
        graph, tree = self._parts
        return nnx.merge(graph, jax.tree.unflatten(tree, weights))


def split(model: InternVL) -> tuple[Structure, tuple[jax.Array, ...]]:
    """A model as the two arguments with which the jitted functions begin."""
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    return Structure(graph, tree), tuple(leaves)


def sample_next(
    logits_RV: Float[Array, "rows vocab"], settings: SamplingState, told: Bool[Array, ""]
) -> Chosen:
    """The next token of every row; with `told` its log probability and those of the best."""
    rows, vocab = logits_RV.shape
    count = min(MAX_TOP_LOGPROBS, vocab)
    keys = row_keys(settings.seed, settings.stream, settings.made)
    token = sample(logits_RV, keys, settings.temperature, settings.top_p, settings.top_k)

    def tell():
        all_RV = jax.nn.log_softmax(logits_RV)
        top, ids = jax.lax.top_k(all_RV, count)
        return jnp.take_along_axis(all_RV, token[:, None], axis=1)[:, 0], ids, top

    def keep():
        zeros = jnp.zeros((rows, count))
        return zeros[:, 0], zeros.astype(jnp.int32), zeros

    return Chosen(token, *jax.lax.cond(told, tell, keep))


def prefill_chunk(
    model: InternVL, cache: KVCache, pool: Float[Array, "tiles tokens width"], chunk: Chunk
) -> tuple[Float[Array, "groups vocab"], KVCache]:
    """Writes the chunk into the cache; logits after each prompt's last token (if it is in it)."""
    config, length = model.config, chunk.ids.shape[1]
    x_GCD = model.text.embed(chunk.ids, model.compute_dtype)
    features_GCD = pool.reshape(-1, config.text.hidden_size)[chunk.features]
    x_GCD = jnp.where(chunk.features[..., None] >= 0, features_GCD.astype(x_GCD.dtype), x_GCD)
    hidden_GCD, grown, _ = model.text(
        x_GCD,
        positions=chunk.start[:, None] + jnp.arange(length),
        lengths=chunk.prompt,
        cache=PrefillUpdate(cache, chunk.row, chunk.start, chunk.valid),
        execution=model.execution,
    )
    assert isinstance(grown, PrefillUpdate)
    end = jnp.clip(chunk.prompt - 1 - chunk.start, 0, length - 1)
    last_GD = jnp.take_along_axis(hidden_GCD, end[:, None, None], axis=1)[:, 0]
    return model.text.next_logits(last_GD), grown.cache


def decode_step(
    model: InternVL,
    tokens: Int[Array, " rows"],
    lengths: Int[Array, " rows"],
    active: Bool[Array, " rows"],
    cache: KVCache,
) -> tuple[Float[Array, "rows vocab"], KVCache]:
    """Logits after one more token of every row; `lengths` counts the tokens before it.

    A row that is not active leaves its slots alone, and its logits mean nothing.
    """
    hidden_R1D, grown, _ = model.text(
        model.text.embed(tokens[:, None], model.compute_dtype),
        positions=lengths[:, None],
        lengths=lengths + 1,
        cache=DecodeUpdate(cache, jnp.where(active, lengths, cache.slots)),
        execution=model.execution,
    )
    assert isinstance(grown, DecodeUpdate)
    return model.text.next_logits(hidden_R1D[:, 0]), grown.cache


# ---------------------------------------------------------------------------------------------
# Jitted


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def encode(structure: Structure, weights, pool, tiles, places):
    """Features of some tiles into their places in the pool; a place beyond its end is none."""
    features = structure.model(weights).encode_images(tiles)
    return pool.at[places].set(features.astype(pool.dtype), mode="drop")


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(structure: Structure, weights, cache: KVCache, pool, chunk: Chunk, told):
    logits, cache = prefill_chunk(structure.model(weights), cache, pool, chunk)
    return sample_next(logits, chunk.settings, told), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    structure: Structure,
    weights,
    cache: KVCache,
    rows: DecodeState,
    stop_ids,
    steps,
    until_one_ends,
    told,
):
    """Up to `steps` (at most DECODE_STEPS) more tokens of every active row.

    Ends when all rows have, or with `until_one_ends` when one has. The results have the steps as
    their second axis; a row that has ended has -1 as its tokens.
    """
    model = structure.model(weights)
    began = rows.active

    def more(carry):
        step, rows, _, _ = carry
        ended = (rows.active != began).any()
        return (step < steps) & rows.active.any() & ~(until_one_ends & ended)

    def once(carry):
        step, rows, made, cache = carry
        logits, cache = decode_step(model, rows.last, rows.lengths, rows.active, cache)
        chosen = sample_next(logits, rows.settings, told)
        shown = replace(chosen, token=jnp.where(rows.active, chosen.token, -1))
        made = jax.tree.map(
            lambda all, new: jax.lax.dynamic_update_index_in_dim(all, new, step, 1), made, shown
        )
        stopped = (chosen.token[:, None] == stop_ids).any(axis=1)
        one = rows.active.astype(jnp.int32)
        rows = DecodeState(
            last=jnp.where(rows.active, chosen.token, rows.last),
            lengths=rows.lengths + one,
            active=rows.active & ~stopped & (rows.left > 1),
            left=rows.left - one,
            settings=replace(rows.settings, made=rows.settings.made + one),
        )
        return step + 1, rows, made, cache

    count = rows.last.shape[0]
    alternatives = min(MAX_TOP_LOGPROBS, model.config.text.vocab_size)
    numbers = jnp.zeros((count, DECODE_STEPS))
    made = Chosen(
        token=jnp.full((count, DECODE_STEPS), -1, jnp.int32),
        logprob=numbers,
        top_ids=jnp.zeros((count, DECODE_STEPS, alternatives), jnp.int32),
        top_logprobs=jnp.zeros((count, DECODE_STEPS, alternatives)),
    )
    _, _, made, cache = jax.lax.while_loop(more, once, (jnp.int32(0), rows, made, cache))
    return made, cache


@functools.partial(jax.jit, static_argnums=1)
def resized(layer: Float[Array, "*layers rows heads slots head_dim"], slots: int):
    """A layer of the cache with more slots, or with fewer."""
    missing = slots - layer.shape[-2]
    if missing <= 0:
        return layer[..., :slots, :]
    return jnp.pad(layer, [*[(0, 0)] * (layer.ndim - 2), (0, missing), (0, 0)])


# ---------------------------------------------------------------------------------------------
# Sizes


def slots_buckets(tokens: int) -> list[int]:
    """Every size that a cache can take while no row has more than so many tokens."""
    found, size = [], MIN_SLOTS
    while True:
        found.append(size)
        if size >= tokens:
            return found
        size = slots_bucket(size + 1)


def slots_bucket(tokens: int) -> int:
    """The next of 128, 192, 256, 384, 512, ...: at most a third is padding."""
    power = power_of_two(max(tokens, MIN_SLOTS))
    return power * 3 // 4 if power > MIN_SLOTS and tokens <= power * 3 // 4 else power


def power_of_two(number: int) -> int:
    """The next one."""
    return 1 << (number - 1).bit_length()


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
