"""What the engine runs on the device: encode tiles, prefill a chunk, decode some tokens.

    tiles --encode--> pool of image features --+
                                               +--prefill--> cache, first token
    ids of a chunk of some prompts ------------+
    cache, newest token of every slot --decode--> tokens

Each is one jitted function that compiles for few shapes: the number of slots and of tiles in the
pool are fixed, chunks come in six lengths and caches in the sizes of `cache_bucket`. The model
comes in as (structure, weights), so that new weights need no new compilation.

Dynamic NTK: a query uses the base of its slot's length so far, and a key keeps the base it was
written with, as in transformers.

Shape suffixes: B slots, G groups of slots, C length of a chunk, D decoder width, V vocabulary.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from mis_jax.inference.requests import MAX_TOP_LOGPROBS
from mis_jax.inference.sampling import sample, slot_keys
from mis_jax.model.config import TextConfig
from mis_jax.model.internvl import InternVL
from mis_jax.model.kv_cache import DecodeUpdate, KVCache, PrefillUpdate
from mis_jax.model.layers import Stack
from mis_jax.parallel.sharding import BATCH_AXES

DECODE_STEPS = 32  # tokens of a slot in one call, at most
MIN_CACHE_LENGTH = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingState:
    """How the next token of every slot is chosen. `num_generated` counts the tokens before it."""

    temperature: Float[Array, " slots"]
    top_p: Float[Array, " slots"]
    top_k: Int[Array, " slots"]
    seed: UInt32[Array, " slots"]
    stream: UInt32[Array, " slots"]
    num_generated: Int[Array, " slots"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Where every slot stands: its newest token is chosen but not yet in the cache."""

    last: Int[Array, " slots"]
    lengths: Int[Array, " slots"]  # tokens in the cache
    active: Bool[Array, " slots"]
    remaining: Int[Array, " slots"]  # tokens it may still make
    settings: SamplingState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chosen:
    """A token of every slot; log probabilities only where they are asked for, else zeros."""

    token: Int[Array, " slots"]
    logprob: Float[Array, " slots"]
    top_ids: Int[Array, "slots alternatives"]
    top_logprobs: Float[Array, "slots alternatives"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunk:
    """A stretch of one prompt in each group of slots."""

    ids: Int[Array, "groups length"]
    features: Int[Array, "groups length"]  # place in the pool of an image token's feature, or -1
    slot: Int[Array, " groups"]  # within its group
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
    logits_BV: Float[Array, "slots vocab"], settings: SamplingState, want_logprobs: Bool[Array, ""]
) -> Chosen:
    """The next token of every slot; if asked, its log probability and those of the best."""
    slots, vocab = logits_BV.shape
    count = min(MAX_TOP_LOGPROBS, vocab)
    keys = slot_keys(settings.seed, settings.stream, settings.num_generated)
    token = sample(logits_BV, keys, settings.temperature, settings.top_p, settings.top_k)

    def computed():
        all_BV = jax.nn.log_softmax(logits_BV)
        top, ids = jax.lax.top_k(all_BV, count)
        return jnp.take_along_axis(all_BV, token[:, None], axis=1)[:, 0], ids, top

    def zeros():
        return jnp.zeros(slots), jnp.zeros((slots, count), jnp.int32), jnp.zeros((slots, count))

    return Chosen(token, *jax.lax.cond(want_logprobs, computed, zeros))


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
        cache=PrefillUpdate(cache, chunk.slot, chunk.start, chunk.valid),
        execution=model.execution,
    )
    assert isinstance(grown, PrefillUpdate)
    end = jnp.clip(chunk.prompt - 1 - chunk.start, 0, length - 1)
    last_GD = jnp.take_along_axis(hidden_GCD, end[:, None, None], axis=1)[:, 0]
    return model.text.next_logits(last_GD), grown.cache


def decode_step(
    model: InternVL,
    tokens: Int[Array, " slots"],
    lengths: Int[Array, " slots"],
    active: Bool[Array, " slots"],
    cache: KVCache,
) -> tuple[Float[Array, "slots vocab"], KVCache]:
    """Logits after one more token of every slot; `lengths` counts the tokens before it.

    A slot that is not active leaves its part of the cache alone, and its logits mean nothing.
    """
    hidden_B1D, grown, _ = model.text(
        model.text.embed(tokens[:, None], model.compute_dtype),
        positions=lengths[:, None],
        lengths=lengths + 1,
        cache=DecodeUpdate(cache, jnp.where(active, lengths, cache.length)),
        execution=model.execution,
    )
    assert isinstance(grown, DecodeUpdate)
    return model.text.next_logits(hidden_B1D[:, 0]), grown.cache


# ---------------------------------------------------------------------------------------------
# Jitted


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def encode(structure: Structure, weights, pool, tiles, places):
    """Features of some tiles into their places in the pool; a place beyond its end is none."""
    features = structure.model(weights).encode_images(tiles)
    return pool.at[places].set(features.astype(pool.dtype), mode="drop")


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(structure: Structure, weights, cache: KVCache, pool, chunk: Chunk, want_logprobs):
    logits, cache = prefill_chunk(structure.model(weights), cache, pool, chunk)
    return sample_next(logits, chunk.settings, want_logprobs), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    structure: Structure,
    weights,
    cache: KVCache,
    state: DecodeState,
    stop_ids,
    steps,
    until_one_ends,
    want_logprobs,
):
    """Up to `steps` (at most DECODE_STEPS) more tokens of every active slot.

    Ends when all slots have, or with `until_one_ends` when one has. The results have the steps as
    their second axis; a slot that has ended has -1 as its tokens.
    """
    model = structure.model(weights)
    began = state.active

    def more(carry):
        step, state, _, _ = carry
        ended = (state.active != began).any()
        return (step < steps) & state.active.any() & ~(until_one_ends & ended)

    def once(carry):
        step, state, generated, cache = carry
        logits, cache = decode_step(model, state.last, state.lengths, state.active, cache)
        chosen = sample_next(logits, state.settings, want_logprobs)
        visible = replace(chosen, token=jnp.where(state.active, chosen.token, -1))
        generated = jax.tree.map(
            lambda all, new: jax.lax.dynamic_update_index_in_dim(all, new, step, 1),
            generated,
            visible,
        )
        stopped = (chosen.token[:, None] == stop_ids).any(axis=1)
        one = state.active.astype(jnp.int32)
        state = DecodeState(
            last=jnp.where(state.active, chosen.token, state.last),
            lengths=state.lengths + one,
            active=state.active & ~stopped & (state.remaining > 1),
            remaining=state.remaining - one,
            settings=replace(state.settings, num_generated=state.settings.num_generated + one),
        )
        return step + 1, state, generated, cache

    count = state.last.shape[0]
    alternatives = min(MAX_TOP_LOGPROBS, model.config.text.vocab_size)
    numbers = jnp.zeros((count, DECODE_STEPS))
    generated = Chosen(
        token=jnp.full((count, DECODE_STEPS), -1, jnp.int32),
        logprob=numbers,
        top_ids=jnp.zeros((count, DECODE_STEPS, alternatives), jnp.int32),
        top_logprobs=jnp.zeros((count, DECODE_STEPS, alternatives)),
    )
    _, _, generated, cache = jax.lax.while_loop(more, once, (jnp.int32(0), state, generated, cache))
    return generated, cache


@functools.partial(jax.jit, static_argnums=1)
def resized(layer: Float[Array, "*layers slots heads length head_dim"], length: int):
    """A layer of a longer cache, or of a shorter one."""
    missing = length - layer.shape[-2]
    if missing <= 0:
        return layer[..., :length, :]
    return jnp.pad(layer, [*[(0, 0)] * (layer.ndim - 2), (0, missing), (0, 0)])


# ---------------------------------------------------------------------------------------------
# Sizes


def cache_buckets(tokens: int) -> list[int]:
    """Every size that a cache can take while no slot has more than so many tokens."""
    found, size = [], MIN_CACHE_LENGTH
    while True:
        found.append(size)
        if size >= tokens:
            return found
        size = cache_bucket(size + 1)


def cache_bucket(tokens: int) -> int:
    """The next of 128, 192, 256, 384, 512, ...: at most a third is padding."""
    power = power_of_two(max(tokens, MIN_CACHE_LENGTH))
    return power * 3 // 4 if power > MIN_CACHE_LENGTH and tokens <= power * 3 // 4 else power


def power_of_two(number: int) -> int:
    """The next one."""
    return 1 << (number - 1).bit_length()


def empty_cache(model: InternVL, slots: int, cache_length: int, dtype: jnp.dtype) -> KVCache:
    """A cache for a model, on the model's own devices."""
    text, mesh = model.config.text, mesh_of(model)
    stacked = isinstance(model.text.layers, Stack)
    cache = KVCache.zeros(text, slots, cache_length, dtype, stacked=stacked)
    if mesh is None:
        return cache
    return jax.device_put(cache, cache_place(mesh, text, stacked=stacked))


def cache_place(mesh: Mesh, text: TextConfig, *, stacked: bool) -> NamedSharding:
    """Slots of the cache are divided over data and fsdp, heads over tensor where they divide."""
    heads = "tensor" if text.num_kv_heads % mesh.shape["tensor"] == 0 else None
    layers = (None,) if stacked else ()
    return NamedSharding(mesh, PartitionSpec(*layers, BATCH_AXES, heads))


def mesh_of(model: InternVL) -> Mesh | None:
    """The mesh that a model is divided over."""
    sharding = model.text.embedding.get_value().sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None
