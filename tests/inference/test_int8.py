"""Keys, values and kernels in eight bits: what they cost, and what they leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_runs import letters, requests_of, run_all
from flax import nnx
from small_model import full_logits, random_batch, random_model, tiny_config

from mis_jax.inference.engine import Engine
from mis_jax.model.attention import grouped_attention
from mis_jax.model.kv_cache import DecodeUpdate, Int8Tokens, KVCache, PrefillUpdate, attend_to
from mis_jax.model.layers import Linear
from mis_jax.model.lora import QuantisedKernel
from mis_jax.model.unrolled import unrolled


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def test_a_token_is_within_half_a_step_of_its_codes(rng):
    x = normal(rng, 3, 2, 5, 16) * jnp.asarray(rng.uniform(0.01, 100, (3, 2, 5, 1)), jnp.float32)
    stored = Int8Tokens.of(x)
    assert stored.codes.dtype == jnp.int8
    off = jnp.abs(stored.codes * stored.scales - x) / stored.scales
    assert 0.3 < float(off.max()) <= 0.501
    assert int(jnp.abs(stored.codes).max()) == 127  # the whole range is used


def test_a_token_of_zeros_stays_one():
    stored = Int8Tokens.of(jnp.zeros((1, 4)))
    np.testing.assert_array_equal(stored.codes * stored.scales, 0)


def test_attention_over_integers_is_that_over_what_they_stand_for(rng):
    """The scales are applied elsewhere than where the tokens are made whole."""
    query, mask = normal(rng, 2, 3, 4, 16), jnp.asarray(rng.random((2, 1, 3, 7)) < 0.7)
    mask = mask.at[..., 0].set(True)
    keys, values = (Int8Tokens.of(normal(rng, 2, 2, 7, 16)) for _ in range(2))
    whole = grouped_attention(query, keys.codes * keys.scales, values.codes * values.scales, mask)
    np.testing.assert_allclose(attend_to(query, keys, values, mask), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stacked", [False, True])
def test_tokens_go_where_they_belong(rng, stacked):
    """A chunk and then a token: the other slots and rows stay as they are."""
    config = tiny_config().text
    cache = KVCache.zeros(config, slots=3, length=12, dtype=jnp.int8, stacked=stacked)
    chunk = PrefillUpdate(cache, jnp.array([1]), jnp.array([2]), jnp.array([True]))
    heads, width = config.num_kv_heads, config.head_dim
    new = normal(rng, 1, 4, heads, width)
    grown, _ = chunk.attend(1, normal(rng, 1, 4, config.num_heads, width), new, new)
    token = DecodeUpdate(grown.cache, jnp.array([12, 6, 12]))  # 12 does not exist
    new_R1KH = normal(rng, 3, 1, heads, width)
    grown, _ = token.attend(1, normal(rng, 3, 1, config.num_heads, width), new_R1KH, new_R1KH)
    keys, values = grown.cache.layer(1)
    assert isinstance(keys, Int8Tokens) and isinstance(values, Int8Tokens)
    expected = np.zeros((3, heads, 12, width), np.float32)
    expected[1, :, 2:6] = new[0].swapaxes(0, 1)
    expected[1, :, 6] = new_R1KH[1, 0]
    for stored in (keys, values):
        np.testing.assert_allclose(
            stored.codes * stored.scales, expected, atol=0.51 * float(stored.scales.max())
        )
    assert not any(x.any() for x in jax.tree.leaves(grown.cache.layer(0)))


def made(model, batch, *, limit=24, **how) -> list[list[int]]:
    engine = Engine(model, stop_ids=(), decode=letters, **({"max_num_seqs": 4} | how))
    answers = run_all(engine, requests_of(batch, max_new_tokens=limit))
    return [[token.id for piece in pieces for token in piece.tokens] for pieces in answers]


@pytest.mark.parametrize("layers", [pytest.param("scanned", marks=pytest.mark.slow), "written out"])
def test_most_answers_are_those_of_a_whole_cache(model, rng, layers):
    model = model if layers == "scanned" else unrolled(model)
    batch = random_batch(rng, [5, 30, 3, 150, 9, 140, 20, 60], [2, 0, 1, 3, 0, 2, 1, 0])
    whole, rounded = made(model, batch), made(model, batch, int8_cache=True)
    first = sum(a[0] == b[0] for a, b in zip(whole, rounded, strict=True))
    assert first >= 7


@pytest.mark.slow
def test_answers_do_not_depend_on_the_rows_beside_them(model, rng):
    """float32 and int8: a row's tokens are rounded by themselves."""
    batch = random_batch(rng, [5, 30, 3, 11], [2, 0, 1, 3])
    together = made(model, batch, int8_cache=True)
    assert together == made(model, batch, int8_cache=True, max_num_seqs=1)
    assert together == made(model, batch, int8_cache=True, max_num_seqs=2, between=2)


def test_the_cache_takes_a_quarter_of_float32(rng):
    config = tiny_config(head_dim=64).text

    def size(dtype):
        cache = KVCache.zeros(config, slots=2, length=128, dtype=dtype)
        return sum(x.nbytes for x in jax.tree.leaves(cache))

    assert size(jnp.int8) == size(jnp.float32) * (64 + 4) / (64 * 4)


# kernels


def kernels(model) -> list[Linear]:
    blocks = model.text.layers.blocks
    return [m for b in blocks for _, m in nnx.iter_modules(b) if isinstance(m, Linear)]


def test_kernels_are_integers_and_the_rest_is_not(model):
    small = unrolled(model, int8=True)
    found = kernels(small)
    assert len(found) == 7 * model.config.text.num_layers
    for linear, plain in zip(found, kernels(unrolled(model)), strict=True):
        assert isinstance(linear.kernel, QuantisedKernel)
        values, scale = linear.kernel.values, linear.kernel.scale
        assert values.dtype == jnp.int8 and values.axes == plain.kernel.axes
        np.testing.assert_allclose(
            linear.weight(jnp.dtype(jnp.float32)),
            plain.kernel[...],
            atol=0.51 * float(scale[...].max()),
        )
    assert small.text.head.dtype == jnp.float32
    others = jax.tree.leaves(nnx.state(small.vision))
    assert others and all(x.dtype == jnp.float32 for x in others)


def test_a_product_is_that_of_the_kernel_it_stands_for(model, rng):
    for linear in kernels(unrolled(model, int8=True))[:7]:
        x = normal(rng, 2, 5, linear.kernel.values.shape[1])
        expected = x @ linear.weight(jnp.dtype(jnp.float32)).T
        expected = expected if linear.bias is None else expected + linear.bias[...]
        np.testing.assert_allclose(linear(x), expected, rtol=1e-5, atol=1e-5)


def test_next_token_probabilities_stay_close(model, rng):
    """Over the answers of the whole model: mean divergence, and the best token."""
    batch = random_batch(rng, [5, 30, 3, 11], [2, 0, 1, 3])
    tokens = made(model, batch, limit=40)
    whole = np.concatenate(full_logits(model, batch, tokens))
    small = unrolled(model, int8=True)
    again = np.concatenate(full_logits(small, batch, tokens))
    p, q = (jax.nn.log_softmax(x) for x in (whole, again))
    divergence = float((jnp.exp(p) * (p - q)).sum(-1).mean())
    assert 0 < divergence < 0.005  # of 14 seeds the worst was 0.0008
    assert (whole.argmax(-1) == again.argmax(-1)).mean() > 0.95


@pytest.mark.slow
def test_a_random_model_of_any_kind_answers_with_both(seed, rng):
    for changes in (dict(kind="qwen3"), dict(kind="internlm2")):
        model = unrolled(random_model(tiny_config(**changes), seed), int8=True)
        batch = random_batch(rng, [5, 30], [2, 0])
        assert [len(answer) for answer in made(model, batch, int8_cache=True)] == [24, 24]
