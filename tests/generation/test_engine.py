"""The engine against the full forward pass, and what must not change an answer."""

import contextlib
import dataclasses
import functools

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_model import (
    IMAGE_TOKEN,
    VOCAB,
    full_logits,
    random_batch,
    random_model,
    rows_of,
    run,
    tiny_config,
)

from mis_jax.generation import engine
from mis_jax.generation.engine import generate_tokens, slots_bucket
from mis_jax.generation.sampling import Sampling
from mis_jax.model import text
from mis_jax.model.batch import Batch
from mis_jax.model.layers import rotary_angles

HOT = Sampling(temperature=1.0)


@functools.partial(jax.jit, static_argnums=0)
def one_more(graph, weights, *inputs):
    return engine.decode_step(nnx.merge(graph, weights), *inputs)


def step_by_step(model, batch, new) -> np.ndarray:
    """Logits after the prompt and after each of the new tokens: [row, step, vocab]."""
    weights, lengths = nnx.split(model), batch.segment_ids.sum(1).astype(np.int32)
    x = engine._embed(*weights, batch.input_ids, engine.encode(model, batch))
    logits, cache = engine._prefill(*weights, x, lengths)
    cache = engine._grow(cache, batch.input_ids.shape[1] + new.shape[1])
    steps = [logits]
    for step in range(new.shape[1]):
        logits, cache = one_more(*weights, new[:, step], lengths + step, cache)
        steps.append(logits)
    return np.stack(steps, axis=1)


def test_prefill_and_decode_equal_the_full_forward(model, rng):
    batch = random_batch(rng, [5, 9, 3, 14], [2, 0, 1, 1])
    new = rng.integers(IMAGE_TOKEN + 1, VOCAB, (4, 6)).astype(np.int32)
    steps, full = step_by_step(model, batch, new), full_logits(model, batch, new)
    np.testing.assert_allclose(steps, full, atol=2e-4)


def test_tokens_are_the_best_of_the_full_forward(model, rng):
    batch = random_batch(rng, [5, 30, 3, 11], [2, 0, 1, 3])
    made = generate_tokens(model, batch, max_new_tokens=80, stop_ids=())
    assert made.prompt_tokens == list(batch.segment_ids.sum(1))
    assert made.finish_reason == ["length"] * 4
    full = full_logits(model, batch, made.tokens)
    compared = 0
    for row, logits in zip(made.tokens, full, strict=True):
        tokens, logits = np.array(row), logits[:-1]
        best = np.sort(logits, axis=-1)
        sure = best[:, -1] - best[:, -2] > 1e-3
        # an image token that the model writes is a word like any other; the full pass has no
        # picture for it
        sure &= np.cumsum(tokens == IMAGE_TOKEN) == 0
        compared += sure.sum()
        np.testing.assert_array_equal(tokens[sure], logits.argmax(-1)[sure])
    assert compared > 80


def test_every_row_ends_at_its_own_stop_token(model, rng):
    """Also over several decode calls, the first token and the last one."""
    batch = random_batch(rng, [4, 9, 6, 5], [0, 1, 0, 2])
    limit = 2 * engine.DECODE_STEPS + 10
    free = generate_tokens(model, batch, max_new_tokens=limit, stop_ids=(), sampling=HOT)
    chosen = {free.tokens[0][0], free.tokens[1][40], free.tokens[2][100]}
    made = generate_tokens(
        model, batch, max_new_tokens=limit, stop_ids=sorted(chosen), sampling=HOT
    )
    assert made.tokens[0] == [] and made.finish_reason[0] == "stop"
    for row, tokens in enumerate(free.tokens):
        ends = [i for i, token in enumerate(tokens) if token in chosen]
        assert made.tokens[row] == tokens[: ends[0] if ends else limit]
        assert made.finish_reason[row] == ("stop" if ends else "length")
        assert chosen.isdisjoint(made.tokens[row])


def test_a_stop_token_in_the_last_place_is_a_stop(model, rng):
    batch = random_batch(rng, [6])
    free = generate_tokens(model, batch, max_new_tokens=1, stop_ids=())
    made = generate_tokens(model, batch, max_new_tokens=1, stop_ids=free.tokens[0])
    assert (made.tokens, made.finish_reason) == ([[]], ["stop"])


@pytest.mark.parametrize("limit", [1, 2, engine.DECODE_STEPS + 1, engine.DECODE_STEPS + 2])
def test_max_new_tokens(model, rng, limit):
    made = generate_tokens(model, random_batch(rng, [3, 8]), max_new_tokens=limit, stop_ids=())
    assert [len(tokens) for tokens in made.tokens] == [limit, limit]


def test_decoding_ends_when_all_rows_have(model, rng, monkeypatch):
    calls = []
    real = engine._decode
    monkeypatch.setattr(engine, "_decode", lambda *a: calls.append(a) or real(*a))
    batch = random_batch(rng, [6, 4])
    generate_tokens(model, batch, max_new_tokens=400, stop_ids=range(VOCAB))
    assert not calls
    free = generate_tokens(model, batch, max_new_tokens=3, stop_ids=())
    calls.clear()
    generate_tokens(model, batch, max_new_tokens=400, stop_ids=[t[2] for t in free.tokens])
    assert len(calls) == 1


@pytest.mark.parametrize("sampling", [None, HOT], ids=["greedy", "sampled"])
def test_a_row_does_not_depend_on_the_rows_beside_it(model, rng, sampling):
    batch = random_batch(rng, [5, 40, 3, 130], [2, 0, 1, 0])

    def make(rows, **how):
        how |= dict(max_new_tokens=24, stop_ids=(), sampling=sampling, row_ids=rows)
        return generate_tokens(model, rows_of(batch, rows), **how).tokens

    together = make([0, 1, 2, 3])
    assert make([3, 2, 0]) == [together[3], together[2], together[0]]
    for row in range(4):
        assert make([row]) == [together[row]]
    assert make([1], min_rows=3) == [together[1]]


def test_padding_does_not_matter(model, rng):
    batch = random_batch(rng, [5, 12], [1, 2])
    fills = dict(input_ids=IMAGE_TOKEN, positions=0, segment_ids=0, loss_weights=0)
    wide = dataclasses.replace(
        batch,
        **{
            name: np.pad(getattr(batch, name), ((0, 0), (0, 99)), constant_values=fill)
            for name, fill in fills.items()
        },
    )
    made = [generate_tokens(model, b, max_new_tokens=9, stop_ids=()) for b in (wide, batch)]
    assert made[0] == made[1]


def test_sampling_is_reproducible_and_follows_the_seed(model, rng):
    batch = random_batch(rng, [6, 6, 4])

    def make(**setting):
        how = dict(max_new_tokens=16, stop_ids=(), sampling=Sampling(**setting))
        return generate_tokens(model, batch, **how).tokens

    hot = dict(temperature=3.0)
    assert make(**hot, seed=1) == make(**hot, seed=1)
    assert make(**hot, seed=1) != make(**hot, seed=2)
    assert make(**hot, top_k=1) == make(**hot, top_p=1e-6) == make() == make(temperature=1e-6)
    assert make(**hot) != make()


def test_rows_of_the_same_prompt_are_drawn_independently(model, rng):
    batch = rows_of(random_batch(rng, [6]), [0, 0])
    hot = Sampling(temperature=3.0)
    first, second = generate_tokens(
        model, batch, max_new_tokens=16, stop_ids=(), sampling=hot
    ).tokens
    assert first != second


@contextlib.contextmanager
def compilations():
    """Names of everything that is compiled meanwhile, operations outside of jit included."""
    names: list[str] = []

    def note(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_a_varied_stream_compiles_no_more(model, seed, rng):
    """Another model of the same sizes, other lengths, tiles, stops, settings and limits."""

    def ask(model, lengths, tiles, limit, stops):
        batch, seed = random_batch(rng, lengths, tiles), int(rng.integers(99))
        ids = rng.integers(0, 9, len(lengths))
        hot = Sampling(temperature=rng.uniform(0.1, 2), top_p=rng.uniform(0.1, 1), seed=seed)
        for sampling in (None, hot):
            generate_tokens(
                model, batch, max_new_tokens=limit, stop_ids=stops, sampling=sampling, row_ids=ids
            )

    other = random_model(tiny_config(), seed)
    ask(model, [99, 90, 9], [2, 2, 2], 70, (3,))
    ask(model, [99, 90, 9], [1, 2, 0], 30, (3,))
    ask(model, [9, 9, 9], [1, 2, 0], 9, (3,))
    with compilations() as later:
        jax.jit(lambda x: x + 1)(0.0)
    assert later  # they are counted
    with compilations() as later:
        for _ in range(8):
            rows = int(rng.integers(3, 5))
            tiles = [2, 1, *(int(t) for t in rng.integers(0, 3, rows - 2))]
            lengths = [int(n) for n in rng.integers(3, 100, rows)]
            stops = [int(t) for t in rng.integers(0, VOCAB, rng.integers(0, 4))]
            ask(other, lengths, tiles, int(rng.integers(2, 30)), stops)
    assert later == []


def test_buckets_are_few_and_waste_little():
    sizes = {tokens: slots_bucket(tokens) for tokens in range(1, 5000)}
    assert all(size >= tokens for tokens, size in sizes.items())
    assert all(size < 1.51 * tokens for tokens, size in sizes.items() if tokens > 128)
    assert sorted(set(sizes.values()))[:5] == [128, 192, 256, 384, 512]
    assert len(set(sizes.values())) <= 12


def test_many_tiles_go_through_the_tower_in_parts(model, rng, monkeypatch):
    batch = random_batch(rng, [5, 4, 9], [5, 0, 2])
    expected = np.asarray(model.encode_images(batch.tiles[batch.tile_mask]))
    for at_once in (2, 4, 16):
        monkeypatch.setattr(engine, "TILES_AT_ONCE", at_once)
        features = engine.encode(model, batch)
        assert features.shape[0] == 8
        np.testing.assert_allclose(features[:7], expected, atol=1e-4)


# dynamic NTK


def test_dynamic_ntk_beyond_the_limit(seed, rng, monkeypatch):
    """A cached key keeps the base of the length at which it was written, as in transformers.

    So the reference gives every token its own length: that of the prompt for the tokens of the
    prompt, and the place + 1 for each new one.
    """
    model = random_model(tiny_config(rope_dynamic_factor=2.0, max_position=24), seed)
    batch, count = random_batch(rng, [10, 40, 20, 23]), 16
    new = rng.integers(IMAGE_TOKEN + 1, VOCAB, (4, count)).astype(np.int32)
    steps = step_by_step(model, batch, new)

    def per_token(positions, lengths, **sizes):
        own = jnp.maximum(positions + 1, (lengths - count)[:, None])
        angles = rotary_angles(positions.reshape(-1, 1), own.reshape(-1), **sizes)
        return tuple(a.reshape(*positions.shape, -1) for a in angles)

    monkeypatch.setattr(text, "rotary_angles", per_token)
    traced_anew = jax.jit(lambda *inputs: run(*inputs), static_argnums=0)
    full = full_logits(model, batch, new, traced_anew)
    np.testing.assert_allclose(steps, full, atol=5e-4)


# what is refused


def refused(model, batch, words, **changes):
    options = dict(max_new_tokens=4, stop_ids=()) | changes
    with pytest.raises(ValueError, match=words):
        generate_tokens(model, batch, **options)


def test_a_context_that_overflows_is_refused(rng):
    config, dynamic = (tiny_config(max_position=32, rope_dynamic_factor=f) for f in (None, 2.0))
    batch = random_batch(rng, [4, 28])
    assert list(engine.check(batch, config, 4)) == [4, 28]
    assert list(engine.check(batch, dynamic, 99)) == [4, 28]
    words = "row 1: 28 prompt tokens and 5 new tokens .* 32 tokens; .* lower max_new_tokens"
    with pytest.raises(ValueError, match=words):
        engine.check(batch, config, 5)


def test_batches_that_cannot_be_continued_are_refused(model, rng):
    batch = random_batch(rng, [6, 4], [1, 2])
    refused(model, batch, "max_new_tokens is 0", max_new_tokens=0)
    refused(model, batch, "1 row_ids for 2 rows", row_ids=[3])
    refused(model, rows_of(batch, []), "no rows")

    def changed(**fields) -> Batch:
        return dataclasses.replace(batch, **fields)

    packed, left, empty = (batch.segment_ids.copy() for _ in range(3))
    packed[0, 5:], left[1, 0], empty[1] = 2, 0, 0
    refused(model, changed(segment_ids=packed), "row 0 is not one right-padded prompt")
    refused(model, changed(segment_ids=left), "row 1 is not one right-padded prompt")
    refused(model, changed(segment_ids=empty), "row 1 is not one right-padded prompt")
    no_tiles = changed(tile_mask=np.zeros_like(batch.tile_mask))
    refused(model, no_tiles, "row 0 has 4 image tokens and 0 tiles")


def test_bfloat16_activations_give_a_bfloat16_cache(model):
    def traced(graph, weights):
        model = nnx.merge(graph, weights)
        model.compute_dtype = jnp.dtype(jnp.bfloat16)
        x = model.text.embed(jnp.ones((2, 5), int), model.compute_dtype)
        return engine.prefill(model, x, jnp.array([5, 4]))

    logits, cache = jax.eval_shape(functools.partial(traced, *nnx.split(model)))
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32


def test_the_model_is_left_as_it_was(model, rng):
    before = jax.tree.map(np.asarray, nnx.state(model))
    generate_tokens(model, random_batch(rng, [6], [1]), max_new_tokens=5, stop_ids=())
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.state(model)))
