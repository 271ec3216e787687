"""Sums of squares over parameters and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mis_jax.model import xla_cpu


def sum_of_squares(x: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Of all numbers of an array, in float32."""
    if x.size < 2**20:
        return _at_once(x)
    return jax.lax.platform_dependent(x, cpu=xla_cpu.sum_of_squares, default=_at_once)


def norm(tree: Any) -> Float[Array, ""]:
    """Length of all arrays of a tree as one vector."""
    return jnp.sqrt(sum(map(sum_of_squares, jax.tree.leaves(tree)), jnp.zeros(())))


def _at_once(x: Array) -> Array:
    return jnp.sum(jnp.square(x.astype(jnp.float32)))
