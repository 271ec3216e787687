"""Stochastic rounding: right on average, exact where nothing is cut off, useful for training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mis_jax.config import DtypeConfig, OptimizerConfig
from mis_jax.train.optimizer import make_optimizer
from mis_jax.train.stochastic_rounding import apply_updates, round_stochastically, seed_of

pytestmark = pytest.mark.usefixtures("optimized")


def test_the_mean_over_seeds_is_the_value():
    x = jnp.asarray(np.random.default_rng(0).normal(0, 10, 200), jnp.float32)
    rounded = jax.vmap(lambda seed: round_stochastically(x, seed_of(seed)))(jnp.arange(2000))
    assert rounded.dtype == jnp.bfloat16
    values = np.asarray(rounded, np.float64)
    spacing = 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)
    assert (np.abs(values - np.asarray(x)) < spacing).all()  # one of the two neighbours
    # A share of rounding up that is off by five standard deviations has a chance of 1 in 1e6.
    error = np.abs(values.mean(0) - np.asarray(x)) / spacing
    assert error.max() < 5 * 0.5 / np.sqrt(2000)


def test_what_bfloat16_holds_stays_as_it_is():
    values = [0.0, -0.0, 1.0, -2.5, 2.0**-126, 3.3895314e38, np.inf, -np.inf, np.nan]
    for seed in range(20):
        got = np.asarray(round_stochastically(jnp.array(values), seed_of(seed)), np.float32)
        np.testing.assert_array_equal(got[:-3], np.asarray(values[:-3], jnp.bfloat16))
        np.testing.assert_array_equal(got[-3:], values[-3:])


def test_neighbours_and_steps_are_rounded_independently():
    x = jnp.full((64, 64), 1 + 2.0**-8)  # half way
    ups = np.stack([np.asarray(round_stochastically(x, seed_of(s))) > 1 for s in range(40)])
    assert abs(ups.mean() - 0.5) < 0.01
    for axis in (0, 1, 2):
        first, second = (np.take(ups, range(*r), axis).ravel() for r in ((0, 39), (1, 40)))
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.02


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_bfloat16_training_keeps_updates_that_rounding_to_nearest_loses(name):
    """A quadratic at a learning rate whose updates are a fiftieth of bfloat16's spacing at 1."""
    config = OptimizerConfig(
        learning_rate=2e-4, schedule="constant", warmup_ratio=0.0, weight_decay=0.0, name=name
    )
    goal = jnp.asarray(1 + np.random.default_rng(0).uniform(0.02, 0.06, (160, 160)), jnp.float32)

    def distance(dtype: str, moments: str, nearest: bool = False) -> float:
        transform = make_optimizer(config, DtypeConfig(params=dtype, moments=moments), 200)
        params = {"w": jnp.ones_like(goal, dtype)}

        @jax.jit
        def step(params, state, number):
            gradient = {"w": params["w"].astype(jnp.float32) - goal}
            updates, state = transform.update(gradient, state, params)
            if nearest:
                return optax.apply_updates(params, updates), state
            return apply_updates(params, updates, number), state

        state = transform.init(params)
        for number in range(200):
            params, state = step(params, state, number)
        return float(jnp.abs(params["w"].astype(jnp.float32) - goal).mean())

    start = float(jnp.abs(goal - 1).mean())
    exact = distance("float32", "float32")
    assert exact < 0.3 * start
    assert distance("bfloat16", "bfloat16", nearest=True) > 0.9 * start
    # What is left is the spacing of bfloat16 itself above 1.
    assert distance("bfloat16", "bfloat16") < exact + 2**-7


def test_moments_in_bfloat16_follow_those_in_float32():
    """The second moment changes by a thousandth a step: to nearest it would not move at all."""
    config = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_ratio=0.0, clip=1e9)
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros((64, 64))}
    states = {}
    for dtype in ("float32", "bfloat16"):
        transform = make_optimizer(config, DtypeConfig(moments=dtype), 100)
        states[dtype] = (transform, transform.init(params))
    for _ in range(100):
        gradient = {"w": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)}
        for dtype, (transform, state) in states.items():
            states[dtype] = (transform, transform.update(gradient, state, params)[1])
    wide, narrow = (states[d][1][1].nu["w"].astype(jnp.float32) for d in states)
    assert narrow.mean() == pytest.approx(float(wide.mean()), rel=0.01)
