"""Products and their gradients, of one kind each."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from mis_jax.config import DataConfig, DtypeConfig, LoraConfig, RunConfig, Source, TrainConfig
from mis_jax.model.family import published
from mis_jax.model.matmul import matmul_fp32_accum
from mis_jax.parallel.sharding import make_mesh
from mis_jax.train.compiled_step import make_train_program

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (5,)])
def test_gradients_are_those_of_wide_products_of_the_rounded_numbers(shape):
    rng = np.random.default_rng(0)
    x, kernel, slope = (
        jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in (shape, (5, 4), (*shape[:-1], 4))
    )

    def total(x, kernel, product):
        return jnp.sum(matmul_fp32_accum(x, kernel).astype(slope.dtype).astype(jnp.float32) * slope)

    mine = jax.grad(total, (0, 1))(x, kernel, matmul_fp32_accum)
    wide = (x.astype(jnp.float32), kernel.astype(jnp.float32))
    expected = jax.grad(total, (0, 1))(*wide, jnp.dot)
    for gradient, exact in zip(mine, expected, strict=True):
        assert gradient.dtype == jnp.bfloat16
        np.testing.assert_array_equal(gradient, exact.astype(jnp.bfloat16))


def operands(jaxpr: Jaxpr):
    """The dtypes of both operands of every product in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(str(operand.aval.dtype) for operand in equation.invars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
        ):
            if isinstance(inner, ClosedJaxpr):
                yield from operands(inner.jaxpr)
            elif isinstance(inner, Jaxpr):
                yield from operands(inner)


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_no_product_of_a_bfloat16_step_mixes_dtypes(rank):
    """A mixed one would be computed in float32, at a fraction of the rate."""
    source = Source("mis", root=Path("unused"))
    frozen = ("vision", "projector", "language") if rank else ()
    config = RunConfig(
        Path("unused"),
        Path("unused"),
        DataConfig(sources=(source,)),
        TrainConfig(steps=1, global_batch=1, freeze=frozen),
        dtype=DtypeConfig(params="bfloat16", compute="bfloat16", moments="bfloat16"),
        lora=LoraConfig(rank=rank),
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = make_train_program(config, published("internvl2_5-1b"), mesh, 1)
    traced = program.step.trace(program.state, program.batch(1, 384, 1, 448))
    found = list(operands(traced.jaxpr.jaxpr))
    assert len(found) > 20
    assert ("bfloat16", "bfloat16") in found
    assert not [pair for pair in found if len(set(pair)) > 1]
