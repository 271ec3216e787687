"""The engine against the full forward pass, and what must not change an answer."""

import contextlib
import dataclasses

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from engine_runs import generate_tokens, letters, requests_of, run_all
from flax import nnx
from small_model import (
    IMAGE_TOKEN,
    SIZE,
    VOCAB,
    full_logits,
    random_batch,
    random_model,
    rows_of,
    run,
    tiny_config,
)

from mis_jax.inference import image_cache, model_runner
from mis_jax.inference.engine import Engine
from mis_jax.inference.model_runner import DECODE_STEPS, cache_bucket
from mis_jax.inference.requests import Request
from mis_jax.inference.sampling import Sampling
from mis_jax.model import text
from mis_jax.model.kv_cache import DecodeUpdate, KVCache
from mis_jax.model.layers import rotary_angles
from mis_jax.model.unrolled import unrolled

HOT = Sampling(temperature=1.0)


@pytest.fixture(params=["scanned", "written out"])
def either(request, model):
    """The model with its layers stacked, and with its layers one by one."""
    return model if request.param == "scanned" else unrolled(model)


def best_of_the_full_forward(model, batch, tokens, forward=None) -> int:
    """Compares where the choice is sure; how many tokens were compared."""
    compared = 0
    full = full_logits(model, batch, tokens, forward)
    for row, logits in zip(tokens, full, strict=True):
        made, logits = np.array(row), logits[:-1]
        best = np.sort(logits, axis=-1)
        sure = best[:, -1] - best[:, -2] > 1e-3
        # an image token that the model writes is a word like any other; the full pass has no
        # picture for it
        sure &= np.cumsum(made == IMAGE_TOKEN) == 0
        compared += sure.sum()
        np.testing.assert_array_equal(made[sure], logits.argmax(-1)[sure])
    return compared


def test_tokens_are_the_best_of_the_full_forward(model, either, rng):
    batch = random_batch(rng, [5, 30, 3, 11], [2, 0, 1, 3])
    made = generate_tokens(either, batch, max_new_tokens=80)
    assert made.finish_reason == ["length"] * 4
    assert best_of_the_full_forward(model, batch, made.tokens) > 80


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(dict(max_num_seqs=2), marks=pytest.mark.slow),
        pytest.param(dict(groups=2), marks=pytest.mark.slow),
        dict(max_num_seqs=4, groups=4, between=3),
    ],
)
def test_rows_are_given_on(model, either, rng, how):
    """More prompts than rows, short and long, some read in several chunks."""
    texts = [5, 30, 3, 150, 9, 140, 20]
    batch = random_batch(rng, texts, [2, 0, 1, 3, 0, 2, 1])
    made = generate_tokens(either, batch, max_new_tokens=24, **how)
    assert best_of_the_full_forward(model, batch, made.tokens) > 80


def test_long_prompts_are_read_in_chunks(model, rng, monkeypatch):
    """The last chunk overlaps the one before; every length ends at the same logits."""
    monkeypatch.setattr("mis_jax.inference.engine.CHUNKS", (16, 32))
    for length in (31, 32, 33, 64, 65, 100, 180):
        batch = random_batch(rng, [length], [3])
        made = generate_tokens(model, batch, max_new_tokens=8)
        assert best_of_the_full_forward(model, batch, made.tokens) >= 1


def test_no_more_run_than_there_are_rows(model, rng):
    """Also where the device computes more."""
    engine = Engine(model, stop_ids=(), decode=letters, max_num_seqs=1, steps=2)
    for request in requests_of(random_batch(rng, [4] * 3), max_new_tokens=8):
        engine.add(request)
    most = 0
    while not engine.idle:
        engine.step()
        most = max(most, engine.running)
    assert most == 1


def test_an_empty_row_is_given_on_at_once(model, rng):
    """A long answer does not hold the short ones: decoding steps are few."""
    batch = random_batch(rng, [4] * 9)
    requests = [
        dataclasses.replace(request, max_new_tokens=60 if row == 0 else 8)
        for row, request in enumerate(requests_of(batch))
    ]
    engine = Engine(model, stop_ids=(), decode=letters, max_num_seqs=2)
    steps, real = [], model_runner.decode

    def counted(*words):
        made, cache = real(*words)
        steps.append(int((np.asarray(made.token) >= 0).any(axis=0).sum()))
        return made, cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "decode", counted)
        answers = run_all(engine, requests)
    assert [pieces[-1].generated for pieces in answers] == [60] + [8] * 8
    assert sum(steps) <= 64  # one row makes 60 tokens while the other makes 8 x 7 more


def test_every_row_ends_at_its_own_stop_token(model, rng):
    """Also over several decode calls, the first token and the last one."""
    batch = random_batch(rng, [4, 9, 6, 5], [0, 1, 0, 2])
    limit = 2 * DECODE_STEPS + 50
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


@pytest.mark.parametrize("limit", [1, 2, DECODE_STEPS + 1, DECODE_STEPS + 2])
def test_max_new_tokens(model, rng, limit):
    made = generate_tokens(model, random_batch(rng, [3, 8]), max_new_tokens=limit, stop_ids=())
    assert [len(tokens) for tokens in made.tokens] == [limit, limit]


def test_decoding_ends_when_all_rows_have(model, rng, monkeypatch):
    calls = []
    real = model_runner.decode
    monkeypatch.setattr(model_runner, "decode", lambda *a: calls.append(a) or real(*a))
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

    def make(chosen, **how):
        how |= dict(max_new_tokens=24, sampling=sampling, row_ids=chosen)
        return generate_tokens(model, rows_of(batch, chosen), **how).tokens

    together = make([0, 1, 2, 3])
    assert make([3, 2, 0]) == [together[3], together[2], together[0]]
    for row in range(4):
        assert make([row]) == [together[row]]
    assert make([1], max_num_seqs=8) == [together[1]]
    assert make([0, 1, 2, 3], max_num_seqs=2, groups=2) == together


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


def test_nothing_compiles_after_warming_up(model, rng):
    longest = 190  # slots for 128 or 192
    engine = Engine(
        unrolled(model), stop_ids=(3,), decode=letters, max_num_seqs=3, groups=1, between=1
    )
    engine.warm_up(longest)
    asked = []
    for sampling in (Sampling(), HOT):
        lengths = [int(n) for n in rng.integers(3, 120, 6)]
        batch = random_batch(rng, [*lengths, 170], [0, 1, 2, 3, 0, 1, 0])
        longest_answer = min(longest - int(n) for n in batch.segment_ids.sum(1))
        asked += requests_of(batch, max_new_tokens=longest_answer, sampling=sampling, logprobs=2)
    with compilations() as later:
        answers = run_all(engine, asked)
    assert later == []
    assert all(answer[-1].finish_reason for answer in answers)


def test_buckets_are_few_and_waste_little():
    sizes = {tokens: cache_bucket(tokens) for tokens in range(1, 5000)}
    assert all(size >= tokens for tokens, size in sizes.items())
    assert all(size < 1.51 * tokens for tokens, size in sizes.items() if tokens > 128)
    assert sorted(set(sizes.values()))[:5] == [128, 192, 256, 384, 512]
    assert model_runner.cache_buckets(700) == [128, 192, 256, 384, 512, 768]
    assert model_runner.cache_buckets(1) == [128]
    assert model_runner.cache_buckets(192) == [128, 192]
    assert len(set(sizes.values())) <= 12


def images(rng, count):
    return [rng.integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8) for _ in range(count)]


def test_tiles_go_through_the_tower_in_parts(model, rng):
    many = image_cache.FeaturePool(model, 64, jnp.float32)
    wanted = rng.integers(
        0, 256, (2 * image_cache.TILES_AT_ONCE + 3, SIZE, SIZE, 3), dtype=np.uint8
    )
    (held,) = many.take([wanted])
    rounds = 0
    while many.encode_some():
        rounds += 1
    assert rounds == 3 and held.encoded
    expected = np.asarray(model.encode_images(wanted)).reshape(-1, 32)
    places = many.places_of([held])
    np.testing.assert_allclose(
        np.asarray(many.features).reshape(-1, 32)[places], expected, atol=1e-4
    )


def test_a_picture_is_encoded_once(model, rng, monkeypatch):
    """Also in another prompt, also later; the one unused for longest makes room."""
    encoded, real = [], model_runner.encode
    monkeypatch.setattr(
        model_runner,
        "encode",
        lambda *a: encoded.append(int((a[4] < a[2].shape[0]).sum())) or real(*a),
    )
    small = image_cache.FeaturePool(model, 4, jnp.float32)
    a, b, c, d = images(rng, 4)

    def ask(*wanted):
        held = small.take(list(wanted))
        while small.encode_some():
            pass
        return held

    first = ask(a, b, a)
    assert sum(encoded) == 2
    second = ask(b, c, d)
    assert sum(encoded) == 4
    assert small.take(images(rng, 1)) is None  # everything is in use
    small.release(first)
    small.release(second)
    small.release(ask(b))
    assert sum(encoded) == 4
    small.release(ask(*images(rng, 3)))  # b was used last and stays
    small.release(ask(b))
    assert sum(encoded) == 7
    small.release(ask(a))
    assert sum(encoded) == 8
    ask(*images(rng, 9))  # more than the pool: it grows
    assert small.size == 16 and sum(encoded) == 17


def test_prompts_that_share_pictures(model, rng):
    """Two images of a prompt, in other orders and beside others, as in the full pass."""
    batch = random_batch(rng, [5, 9, 8], [2, 2, 2])
    tiles = batch.tiles.reshape(3, 2, SIZE, SIZE, 3).copy()
    tiles[1], tiles[2, 0] = tiles[0, ::-1], tiles[0, 1]
    batch = dataclasses.replace(batch, tiles=tiles.reshape(-1, SIZE, SIZE, 3))
    engine = Engine(model, stop_ids=(), decode=letters, max_num_seqs=2, pool_tiles=2)
    made = run_all(engine, requests_of(batch, [[1, 1]] * 3, max_new_tokens=12))
    tokens = [[token.id for piece in pieces for token in piece.tokens] for pieces in made]
    assert best_of_the_full_forward(model, batch, tokens) > 12
    assert len({tuple(row) for row in tokens}) == 3


# dynamic NTK


def test_dynamic_ntk_beyond_the_limit(seed, rng, monkeypatch):
    """A cached key keeps the base of the length at which it was written, as in transformers.

    So the reference gives every token its own length: that of the prompt for the tokens of the
    prompt, and the place + 1 for each new one.
    """
    model = random_model(tiny_config(rope_dynamic_factor=2.0, max_position=24), seed)
    batch, count = random_batch(rng, [10, 40, 20, 23]), 16
    made = generate_tokens(model, batch, max_new_tokens=count)

    def per_token(positions, lengths, **sizes):
        own = jnp.maximum(positions + 1, (lengths - count)[:, None])
        angles = rotary_angles(positions.reshape(-1, 1), own.reshape(-1), **sizes)
        return tuple(a.reshape(*positions.shape, -1) for a in angles)

    monkeypatch.setattr(text, "rotary_angles", per_token)
    traced_anew = jax.jit(lambda *inputs: run(*inputs), static_argnums=0)
    assert best_of_the_full_forward(model, batch, made.tokens, traced_anew) > 32


# what is refused


def refused(model, request: Request, words: str, **limits):
    with pytest.raises(ValueError, match=words):
        Engine(model, stop_ids=(), decode=letters, max_num_seqs=2, **limits).add(request)


def test_a_context_that_overflows_is_refused(seed, rng):
    request = requests_of(random_batch(rng, [28]), max_new_tokens=5)[0]
    words = "28 prompt tokens and 5 new tokens exceed the context of 32 tokens; .* lower max_new"
    refused(random_model(tiny_config(max_position=32), seed), request, words)
    dynamic = random_model(tiny_config(max_position=32, rope_dynamic_factor=2.0), seed)
    refused(dynamic, request, words, max_length=32)
    longest = dataclasses.replace(request, max_new_tokens=4)
    for limits in (dict(max_length=32), {}):
        assert (
            Engine(dynamic, stop_ids=(), decode=letters, max_num_seqs=2, **limits).add(longest) == 0
        )


def test_requests_that_cannot_be_answered_are_refused(model, rng):
    request = requests_of(random_batch(rng, [6], [1]))[0]

    def changed(**fields) -> Request:
        example = dataclasses.replace(request.example, **fields)
        return dataclasses.replace(request, example=example)

    refused(model, dataclasses.replace(request, max_new_tokens=0), "max_new_tokens is 0")
    refused(model, changed(input_ids=np.zeros(0, np.int32)), "the prompt is empty")
    no_tiles = changed(tiles=np.zeros((0, SIZE, SIZE, 3), np.uint8), tiles_per_image=())
    refused(model, no_tiles, "4 image tokens and 0 tiles")


def test_bfloat16_activations_give_a_bfloat16_cache(model, rng):
    graph, weights = nnx.split(model)
    narrow = nnx.merge(graph, weights)
    narrow.compute_dtype = jnp.dtype(jnp.bfloat16)
    engine = Engine(narrow, stop_ids=(), decode=letters, max_num_seqs=2)
    assert isinstance(engine._cache, KVCache)
    assert {x.dtype for x in jax.tree.leaves(engine._cache)} == {jnp.dtype(jnp.bfloat16)}
    run_all(engine, requests_of(random_batch(rng, [6], [1]), max_new_tokens=3))
    assert {x.dtype for x in jax.tree.leaves(engine._cache)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_new_token_goes_into_its_own_slot(rng, dtype):
    """On a CPU the two dtypes are written in different ways."""
    config = tiny_config().text
    cache = KVCache.zeros(config, slots=3, length=6, dtype=dtype)
    new = jnp.asarray(rng.normal(size=(3, 1, config.num_kv_heads, config.head_dim)), dtype)
    query = jnp.zeros((3, 1, config.num_heads, config.head_dim), dtype)
    slots = [0, 4, 6]  # 6 does not exist
    grown, _ = DecodeUpdate(cache, jnp.array(slots)).attend(1, query, new, -new)
    for stored, sign in zip(grown.cache.layer(1), (1, -1), strict=True):
        expected = np.zeros(stored.shape, np.float32)
        for row in (0, 1):
            expected[row, :, slots[row]] = sign * np.asarray(new, np.float32)[row, 0]
        np.testing.assert_array_equal(np.asarray(stored, np.float32), expected)


def test_the_model_is_left_as_it_was(model, rng):
    before = jax.tree.map(np.asarray, nnx.state(model))
    generate_tokens(unrolled(model), random_batch(rng, [6], [1]), max_new_tokens=5)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.state(model)))


def test_a_consumed_model_gives_its_memory_back(seed):
    model = random_model(tiny_config(), seed)
    stacked = [
        p.get_value() for _, p in nnx.iter_graph(model.text.layers) if isinstance(p, nnx.Param)
    ]
    unrolled(model, consume=True)
    assert stacked and all(array.is_deleted() for array in stacked)


# what is told


def told(model, batch, *, stop_ids=(), steps=3, **how):
    engine = Engine(model, stop_ids=stop_ids, decode=letters, max_num_seqs=4, steps=steps)
    return run_all(engine, requests_of(batch, **how))


def test_pieces_make_up_the_answer(model, rng):
    batch = random_batch(rng, [6, 9], [1, 0])
    pieces = told(model, batch, max_new_tokens=20)
    assert all(len(row) > 5 for row in pieces)
    for row in pieces:
        ids = [token.id for piece in row for token in piece.tokens]
        assert "".join(piece.text for piece in row) == letters(ids)
        assert [piece.finish_reason for piece in row[:-1]] == [None] * (len(row) - 1)
        assert row[-1].finish_reason == "length" and row[-1].generated == len(ids) == 20
    whole = told(model, batch, max_new_tokens=20, streamed=False)
    assert [len(row) for row in whole] == [1, 1]
    assert [row[0].text for row in whole] == ["".join(p.text for p in row) for row in pieces]


def test_an_answer_ends_before_a_stop_string(model, rng):
    batch = random_batch(rng, [6])
    (free,) = told(model, batch, max_new_tokens=20, sampling=HOT)
    text = "".join(piece.text for piece in free)
    stop = text[7:10]
    cut = text[: text.find(stop)]
    for steps in (1, 3, 8):  # tokens made at once: more while nobody waits
        how = dict(max_new_tokens=20, sampling=HOT, stop=("never", stop))
        (made,) = told(model, batch, steps=steps, **how)
        assert "".join(piece.text for piece in made) == cut
        assert made[-1].finish_reason == "stop"
        assert sum(len(piece.tokens) for piece in made) == len(cut)
        assert made[-1].generated == len(cut) + len(stop)  # a letter a token


def test_log_probabilities(model, rng):
    """Those of the full pass, whatever the temperature; alternatives with the best first."""
    batch = random_batch(rng, [6, 9, 4], [1, 0, 0])
    hot = Sampling(temperature=1.7, seed=3)
    pieces = told(model, batch, max_new_tokens=10, sampling=hot, logprobs=5)
    made = [[token for piece in row for token in piece.tokens] for row in pieces]
    full = full_logits(model, batch, [[token.id for token in row] for row in made])
    for row, logits in zip(made, full, strict=True):
        expected = np.asarray(jax.nn.log_softmax(logits[:-1]))
        for step, token in enumerate(row):
            if IMAGE_TOKEN in [t.id for t in row[:step]]:
                break
            assert token.logprob == pytest.approx(expected[step, token.id], abs=2e-3)
            assert len(token.top) == 5
            best = np.sort(expected[step])[::-1][:5]
            np.testing.assert_allclose([p for _, p in token.top], best, atol=2e-3)
    (plain,) = told(model, rows_of(batch, [0]), max_new_tokens=4)
    assert all(
        token.logprob is None and token.top == () for piece in plain for token in piece.tokens
    )


def test_a_cancelled_request_frees_its_row(model, rng):
    requests = requests_of(random_batch(rng, [6, 5, 9], [1, 0, 2]), max_new_tokens=200)
    engine = Engine(model, stop_ids=(), decode=letters, max_num_seqs=2, steps=4)
    first, second, third = (engine.add(request) for request in requests)
    engine.step()
    engine.step()
    assert (engine.running, engine.waiting) == (2, 1)
    engine.cancel(first)
    assert engine.running == 1
    engine.step()
    assert (engine.running, engine.waiting) == (2, 0)
    engine.cancel(second)
    alone = generate_tokens(model, rows_of(random_batch(rng, [4]), [0]), max_new_tokens=1)
    assert alone.generated == [1]
    pieces = []
    while not engine.idle:
        pieces += engine.step()
    assert {ticket for ticket, _ in pieces} == {third}
    assert pieces[-1][1].generated == 200
