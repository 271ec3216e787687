"""Sums of squares over parameters and gradients."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_SMALL = 2**16  # numbers below which nothing is gained
_PARTS = 64


def sum_of_squares(x: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Of all numbers of an array, in float32."""
    if x.size < 2**20:
        return _at_once(x)
    return jax.lax.platform_dependent(x, cpu=_part_by_part, default=_at_once)


def norm(tree: Any) -> Float[Array, ""]:
    """Length of all arrays of a tree as one vector."""
    return jnp.sqrt(sum(map(sum_of_squares, jax.tree.leaves(tree)), jnp.zeros(())))


def _at_once(x: Array) -> Array:
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


def _part_by_part(x: Array) -> Array:
    """XLA's reductions on a CPU read 2 GB/s; sums of whole parts, as maps, read 20."""
    return _summed(x, lambda part: jnp.square(part.astype(jnp.float32)))


def _summed(x: Array, of: Callable[[Array], Array]) -> Array:
    if x.ndim > 2:  # a stack: layer by layer
        axis = 0
    else:  # neighbouring rows go to different parts, so that rows in shards stay where they are
        axis, parts = 1, math.gcd(x.shape[0], _PARTS)
        if x.size < _SMALL or parts == 1:
            return jnp.sum(of(x))
        x = x.reshape(-1, parts, *x.shape[1:])

    def add(part: Array, total: Array) -> Array:
        return total + of(jax.lax.dynamic_index_in_dim(x, part, axis, keepdims=False))

    shape = x.shape[:axis] + x.shape[axis + 1 :]
    total = jax.lax.fori_loop(0, x.shape[axis], add, jnp.zeros(shape, jnp.float32))
    return _summed(total, lambda part: part)
