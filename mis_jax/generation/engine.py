"""The engine: encode tiles, prefill the prompt into a cache, decode until every row has stopped.

    tiles --encode--> features --+
                                 +--embed--> x --prefill--> cache, first token --decode--> tokens
    ids -------------------------+

Every arrow is one jitted function, and each compiles for few shapes: rows and tiles come in powers
of two, prompts and caches in the sizes of `slots_bucket`. The cache starts as long as the prompt
and grows by such steps, so its size never depends on `max_new_tokens`.

Rows are right-padded. A new token goes to the slot after the row's own last one, over the padding,
and looks at no slot beyond its own; so a row's answer does not depend on the rows beside it.

Dynamic NTK: a query uses the base of its row's length so far, and a key keeps the base it was
written with, as in transformers.

Shape suffixes: B batch, T length, S cache slots, D decoder width, V vocabulary.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from mis_jax.generation.sampling import Sampling, row_keys, sample
from mis_jax.model.batch import Batch
from mis_jax.model.config import InternVLConfig
from mis_jax.model.execution import Execution
from mis_jax.model.internvl import InternVL, merge
from mis_jax.model.text import KVCache, Seen

FinishReason = Literal["stop", "length"]

DECODE_STEPS = 64  # tokens between two looks of the host at the rows
TILES_AT_ONCE = 16  # through the vision tower
FEW_LAYERS = 8  # so many are written out: no slicing of stacked parameters, still quick to compile
MIN_ROWS = 2  # bf16 products of a single row are pathologically slow on CPUs
MIN_SLOTS = 128


@dataclass(frozen=True)
class Generated:
    """One entry a row; `tokens` are without the stop token."""

    tokens: list[list[int]]
    finish_reason: list[FinishReason]
    prompt_tokens: list[int]


def generate_tokens(
    model: InternVL,
    batch: Batch,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling | None = None,
    row_ids: Sequence[int] | None = None,
    min_rows: int = 1,
) -> Generated:
    """Continue every row of `batch` until a stop token or `max_new_tokens`.

    `row_ids` name the rows' random streams (default 0, 1, ...). A batch of fewer than `min_rows`
    is computed as if it had so many: a short last batch then needs no compilation of its own.

    Raises ValueError for a row that
    is empty, packed or not right-padded, whose image tokens do not match its tiles, or whose
    prompt and new tokens exceed the model's context.
    """
    sampling = sampling or Sampling()
    lengths = check(batch, model.config, max_new_tokens)
    rows, longest = len(lengths), int(lengths.max())
    row_ids = range(rows) if row_ids is None else row_ids
    if len(row_ids) != rows:
        raise ValueError(f"{len(row_ids)} row_ids for {rows} rows; give one for each row")
    padded_rows, length = rows_bucket(max(rows, min_rows)), slots_bucket(longest)
    weights = nnx.split(model)
    ids = np.zeros((padded_rows, length), np.int32)
    ids[:rows, :longest] = np.where(batch.segment_ids, batch.input_ids, 0)[:, :longest]
    state = DecodeState(
        last=jnp.asarray(np.zeros(padded_rows, np.int32)),
        lengths=jnp.asarray(np.pad(lengths, (0, padded_rows - rows), constant_values=1)),
        finished=jnp.asarray(np.arange(padded_rows) >= rows),
    )
    choice = Choice(
        draw=None if sampling.temperature == 0 else Draw.of(sampling, row_ids, padded_rows),
        stop_ids=_padded_stop_ids(stop_ids),
    )
    x = _embed(*weights, ids, encode(model, batch))
    logits, cache = _prefill(*weights, x, state.lengths)
    state = _first(logits, state, choice)
    pieces = [np.asarray(state.last)[:, None]]
    made = 1
    while made < max_new_tokens and not np.asarray(state.finished).all():
        steps = min(DECODE_STEPS, max_new_tokens - made)
        slots = slots_bucket(longest + made + steps)
        if slots > cache.keys.shape[2]:
            cache = _grow(cache, slots)
        tokens, state, cache = _decode(
            *weights, cache, state, choice, np.int32(made), np.int32(steps)
        )
        pieces.append(np.asarray(tokens)[:, :steps])
        made += steps
    return _collect(np.concatenate(pieces, axis=1)[:rows], stop_ids, max_new_tokens, lengths)


def _collect(tokens, stop_ids, max_new_tokens, lengths) -> Generated:
    result = Generated([], [], [int(n) for n in lengths])
    for row in tokens:
        stops = np.flatnonzero(np.isin(row, np.asarray(stop_ids, np.int64)))
        end = int(stops[0]) if len(stops) else max_new_tokens
        result.tokens.append([int(token) for token in row[:end]])
        result.finish_reason.append("stop" if len(stops) else "length")
    return result


# ---------------------------------------------------------------------------------------------
# Pure functions of a model


def prefill(
    model: InternVL, x_BTD: Float[Array, "batch length width"], lengths: Int[Array, " batch"]
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Logits after the last real token of every row, and a cache with `length` slots."""
    batch, length, _ = x_BTD.shape
    slots = jnp.broadcast_to(jnp.arange(length), (batch, length))
    real_BS = slots < lengths[:, None]
    earlier_TS = slots[0][:, None] >= slots[0][None, :]
    hidden_BTD, cache, _ = model.text(
        x_BTD,
        positions=slots,
        lengths=lengths,
        seen=Seen(mask=(earlier_TS & real_BS[:, None, :])[:, None]),
        cache=KVCache.zeros(model.config.text, batch, length, x_BTD.dtype),
        slots=slots,
        execution=_execution(model),
    )
    last_BD = jnp.take_along_axis(hidden_BTD, (lengths - 1)[:, None, None], axis=1)[:, 0]
    assert cache is not None
    return model.text.logits(last_BD), cache


def decode_step(
    model: InternVL,
    tokens: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
    cache: KVCache,
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Logits after one more token of every row; `lengths` counts the tokens before it."""
    x_B1D = model.text.embed(tokens[:, None], model.compute_dtype)
    slots = lengths[:, None]
    earlier_BS = jnp.arange(cache.keys.shape[2]) <= slots
    hidden_B1D, written, _ = model.text(
        x_B1D,
        positions=slots,
        lengths=lengths + 1,
        seen=Seen(mask=earlier_BS[:, None, None]),
        cache=cache,
        slots=slots,
        execution=_execution(model),
    )
    assert written is not None
    return model.text.logits(hidden_B1D[:, 0]), written


def _execution(model: InternVL) -> Execution:
    few = model.config.text.num_layers <= FEW_LAYERS
    return replace(model.execution, unroll=few or model.execution.unroll)


def encode(model: InternVL, batch: Batch) -> Float[Array, "tiles tokens width"] | None:
    """Features of the valid tiles alone, in row order, padded to a power of two of tiles."""
    tiles = np.asarray(batch.tiles)[np.asarray(batch.tile_mask)]
    if not len(tiles):
        return None
    config = model.config
    weights = nnx.split(model)
    shape = (_power_of_two(len(tiles)), config.tokens_per_tile, config.text.hidden_size)
    features = _features(shape, model.compute_dtype)
    for start in range(0, len(tiles), TILES_AT_ONCE):
        part = tiles[start : start + TILES_AT_ONCE]
        missing = _power_of_two(len(part)) - len(part)
        part = np.pad(part, ((0, missing), (0, 0), (0, 0), (0, 0)))
        features = _place(features, _encode(*weights, part), np.int32(start))
    return features


# ---------------------------------------------------------------------------------------------
# Jitted; the model comes in as (graph, weights), so that new weights need no new compilation


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Where every row stands: its newest token is chosen but not yet in the cache."""

    last: Int[Array, " batch"]
    lengths: Int[Array, " batch"]  # tokens in the cache
    finished: Bool[Array, " batch"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draw:
    """`Sampling` as arrays, and the names of the rows' random streams."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    top_k: Int[Array, ""]
    seed: UInt32[Array, ""]
    row_ids: UInt32[Array, " batch"]

    @classmethod
    def of(cls, sampling: Sampling, row_ids: Sequence[int], padded_rows: int) -> "Draw":
        return cls(
            temperature=jnp.asarray(np.float32(sampling.temperature)),
            top_p=jnp.asarray(np.float32(sampling.top_p)),
            top_k=jnp.asarray(np.int32(sampling.top_k)),
            seed=jnp.asarray(np.uint32(sampling.seed)),
            row_ids=jnp.asarray(
                np.pad(np.asarray(row_ids, np.uint32), (0, padded_rows - len(row_ids)))
            ),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """How tokens are chosen (without `draw` greedily: no sort to compile) and which end a row."""

    draw: Draw | None
    stop_ids: Int[Array, " stops"]

    def __call__(self, logits_BV: Float[Array, "batch vocab"], step) -> Int[Array, " batch"]:
        draw = self.draw
        if draw is None:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        keys = row_keys(draw.seed, draw.row_ids, step)
        return sample(logits_BV, keys, draw.temperature, draw.top_p, draw.top_k)

    def stops(self, tokens: Int[Array, " batch"]) -> Bool[Array, " batch"]:
        return (tokens[:, None] == self.stop_ids).any(axis=1)


_jit = functools.partial(jax.jit, static_argnums=0)


@_jit
def _encode(graph, weights, tiles):
    return nnx.merge(graph, weights).encode_images(tiles)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _features(shape, dtype):
    return jnp.zeros(shape, dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _place(features, part, start):
    return jax.lax.dynamic_update_slice_in_dim(features, part.astype(features.dtype), start, 0)


@_jit
def _embed(graph, weights, ids, features):
    model = nnx.merge(graph, weights)
    x_BTD = model.text.embed(ids, model.compute_dtype)
    if features is None:
        return x_BTD
    # features of all rows stand one after the other: to `merge` the batch is one long row
    is_image = (ids == model.config.image_token_id).reshape(1, -1)
    return merge(x_BTD.reshape(1, -1, x_BTD.shape[-1]), features, is_image).reshape(x_BTD.shape)


@_jit
def _prefill(graph, weights, x, lengths):
    return prefill(nnx.merge(graph, weights), x, lengths)


@jax.jit
def _first(logits, state: DecodeState, choice: Choice):
    token = choice(logits, 0)
    return replace(state, last=token, finished=state.finished | choice.stops(token))


@functools.partial(jax.jit, static_argnums=1)
def _grow(cache: KVCache, slots: int) -> KVCache:
    more = [(0, 0), (0, 0), (0, slots - cache.keys.shape[2]), (0, 0), (0, 0)]
    return jax.tree.map(lambda x: jnp.pad(x, more), cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(graph, weights, cache: KVCache, state: DecodeState, choice: Choice, made, steps):
    """Up to `steps` (at most DECODE_STEPS) more tokens of every row; ends when all rows have."""
    model = nnx.merge(graph, weights)

    def more(carry):
        step, _, state, _ = carry
        return (step < steps) & ~state.finished.all()

    def once(carry):
        step, tokens, state, cache = carry
        logits, cache = decode_step(model, state.last, state.lengths, cache)
        token = choice(logits, made + step)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, step))
        # a finished row writes its last slot again and again: it must not run out of slots
        lengths = state.lengths + ~state.finished
        finished = state.finished | choice.stops(token)
        return step + 1, tokens, DecodeState(token, lengths, finished), cache

    tokens = jnp.zeros((state.last.shape[0], DECODE_STEPS), jnp.int32)
    start = (jnp.int32(0), tokens, state, cache)
    _, tokens, state, cache = jax.lax.while_loop(more, once, start)
    return tokens, state, cache


# ---------------------------------------------------------------------------------------------
# Checks and sizes, on the host


def check(batch: Batch, config: InternVLConfig, max_new_tokens: int) -> np.ndarray:
    """Real length of every row; ValueError for rows that cannot be continued."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; give at least 1")
    segments = np.asarray(batch.segment_ids)
    if not len(segments):
        raise ValueError("the batch has no rows; give at least one")
    lengths = (segments > 0).sum(axis=1).astype(np.int32)
    expected = np.arange(segments.shape[1]) < lengths[:, None]
    wrong = np.flatnonzero((segments != expected).any(axis=1) | (lengths == 0))
    if len(wrong):
        raise ValueError(
            f"row {wrong[0]} is not one right-padded prompt (segment_ids are not 1 ... 1 0 ... 0); "
            "generation takes neither packed nor empty rows"
        )
    ids = np.asarray(batch.input_ids)
    tokens = ((ids == config.image_token_id) & expected).sum(axis=1)
    tiles = np.asarray(batch.tile_mask).reshape(len(ids), -1).sum(axis=1)
    wrong = np.flatnonzero(tokens != tiles * config.tokens_per_tile)
    if len(wrong):
        row = wrong[0]
        raise ValueError(
            f"row {row} has {tokens[row]} image tokens and {tiles[row]} tiles of "
            f"{config.tokens_per_tile} tokens each; make the batch with the model's own processor"
        )
    limit, row = config.text.max_position, int(lengths.argmax())
    if config.text.rope_dynamic_factor is None and lengths[row] + max_new_tokens > limit:
        raise ValueError(
            f"row {row}: {lengths[row]} prompt tokens and {max_new_tokens} new tokens exceed the "
            f"model's context of {limit} tokens; shorten the prompt, use fewer tiles "
            f"(max_tiles) or lower max_new_tokens"
        )
    return lengths


def slots_bucket(tokens: int) -> int:
    """The next of 128, 192, 256, 384, 512, ...: at most a third is padding."""
    power = _power_of_two(max(tokens, MIN_SLOTS))
    return power * 3 // 4 if power > MIN_SLOTS and tokens <= power * 3 // 4 else power


def rows_bucket(rows: int) -> int:
    """The next power of two, at least MIN_ROWS."""
    return max(_power_of_two(rows), MIN_ROWS)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _padded_stop_ids(stop_ids: Sequence[int]) -> Array:
    """A few shapes only; -1 is no token."""
    size = max(_power_of_two(max(len(stop_ids), 1)), 4)
    return jnp.asarray(np.array([*stop_ids, *[-1] * (size - len(stop_ids))], np.int32))
