import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mis_jax.train.optimizer import global_norm, sum_of_squares

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [(), (7,), (2_000_003,), (5, 96, 2200), (4736, 224), (1049, 1000)]
)
def test_sums_are_those_of_numpy(shape, dtype):
    """Small ones, stacks, and tables whose rows divide into parts or do not."""
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x = jnp.asarray(values, dtype)
    expected = np.sum(np.asarray(x, np.float64) ** 2)
    np.testing.assert_allclose(jax.jit(sum_of_squares)(x), expected, rtol=2e-6)


def test_a_norm_is_that_of_all_arrays():
    tree = {"a": jnp.full((3,), 2.0), "b": [jnp.full((2, 2), 1.0)]}
    np.testing.assert_allclose(global_norm(tree), 4.0, rtol=1e-6)
