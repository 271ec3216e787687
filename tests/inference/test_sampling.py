"""The choice of a token from its logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import VOCAB

from mis_jax.inference.sampling import Sampling, sample, slot_keys

ROWS = 4096
draw = jax.jit(sample)


def keys(seed: int, rows: int = ROWS, step: int = 0) -> jax.Array:
    return slot_keys(
        np.full(rows, seed, np.uint32),
        np.arange(rows, dtype=np.uint32),
        np.full(rows, step, np.int32),
    )


def shares(logits, *, temperature=1.0, top_p=1.0, top_k=0, seed=0) -> np.ndarray:
    """How often each token is drawn."""
    tiled = jnp.tile(jnp.asarray(logits, jnp.float32), (ROWS, 1))
    tokens = draw(tiled, keys(seed), temperature, top_p, top_k)
    return np.bincount(np.asarray(tokens), minlength=tiled.shape[1]) / ROWS


@pytest.mark.parametrize(
    "setting",
    [
        dict(temperature=0.0),
        dict(temperature=0.0, top_p=0.5, top_k=3),
        dict(temperature=1.5, top_k=1),
        dict(temperature=1.5, top_p=1e-6),
        dict(temperature=1e-30),
    ],
    ids=str,
)
def test_settings_that_leave_the_best_token(setting, seed, rng):
    logits = rng.normal(size=(64, VOCAB)).astype(np.float32)
    logits[0, [3, 9]] = logits[1] = 5  # ties: the lower id wins
    setting = dict(top_p=1.0, top_k=0) | setting
    tokens = draw(logits, keys(seed, 64), **setting)
    if setting["temperature"] == 1e-30:
        tokens, logits = tokens[2:], logits[2:]
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_the_distribution_is_that_of_the_softmax(seed, rng):
    logits = rng.normal(size=8)
    for temperature in (0.5, 1.0, 2.0):
        expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        seen = shares(logits, temperature=temperature, seed=seed)
        assert np.abs(seen - expected).max() < 5 * (0.25 / ROWS) ** 0.5


def test_top_k_and_top_p_keep_the_right_tokens(seed):
    logits = np.log([0.05, 0.4, 0.1, 0.3, 0.15])

    def seen(**setting):
        return set(np.flatnonzero(shares(logits, seed=seed, **setting)))

    assert seen() == {0, 1, 2, 3, 4}
    assert seen(top_k=2) == {1, 3}
    assert seen(top_k=99) == {0, 1, 2, 3, 4}
    assert seen(top_p=0.69) == {1, 3}
    assert seen(top_p=0.71) == {1, 3, 4}  # the token that crosses the limit belongs to it
    # top_p is a share of what top_k leaves: 0.4 of 0.7 is 0.57
    assert seen(top_k=2, top_p=0.56) == {1}
    assert seen(top_k=2, top_p=0.58) == {1, 3}


def test_a_token_of_no_probability_is_never_drawn(seed):
    logits = np.array([0.0, -np.inf, 0.0, -np.inf])
    for setting in (dict(), dict(top_p=0.99), dict(top_k=4)):
        assert set(np.flatnonzero(shares(logits, seed=seed, **setting))) == {0, 2}


def test_settings_differ_from_row_to_row(seed, rng):
    logits = rng.normal(size=(4, VOCAB)).astype(np.float32)
    temperature = np.float32([0, 1, 1, 1])
    top_p, top_k = np.float32([1, 1, 0.6, 1]), np.int32([0, 0, 0, 5])
    together = draw(logits, keys(seed, 4), temperature, top_p, top_k)
    for row in range(4):
        alone = draw(
            logits[row : row + 1], keys(seed, 4)[row : row + 1],
            temperature[row], top_p[row], top_k[row],
        )  # fmt: skip
        assert alone[0] == together[row]


def test_keys_depend_on_seed_row_and_step(seed):
    def data(*args, **step):
        return np.asarray(jax.random.key_data(keys(*args, **step)))

    here = data(seed, 3)
    np.testing.assert_array_equal(here, data(seed, 5)[:3])
    everything = np.concatenate([here, data(seed + 1, 3), data(seed, 3, step=1)])
    assert len(np.unique(everything, axis=0)) == 9


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")),
        ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("seed", -1), ("seed", 2**32),
    ],
)  # fmt: skip
def test_values_without_meaning_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} is "):
        Sampling(**{field: value})
