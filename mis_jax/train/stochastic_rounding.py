"""Stochastic rounding: what is stored in bfloat16 keeps, on average, the value computed in float32.

A bfloat16 has eight bits of fraction, and at fine-tuning's learning rates most updates are smaller
than half its spacing: rounded to nearest they would all be lost, and so would the changes of a
second moment, a thousandth each. Rounded up with the chance of what is cut off they add up.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

Seed = UInt32[Array, ""]


def seed_of(*numbers: int | Array) -> Seed:
    """One seed of several numbers, such as a step and the place of an array in a tree."""
    seed = jnp.uint32(0x9E3779B9)
    for number in numbers:
        seed = _mixed(seed ^ _mixed(jnp.asarray(number).astype(jnp.uint32) + jnp.uint32(1)))
    return seed


def round_stochastically(x: Float[Array, "*shape"], seed: Seed) -> Float[Array, "*shape"]:
    """bfloat16 of float32 `x`, rounded up or down so that its mean over seeds is `x`.

    The random bits are a hash of an element's place, computed where it is needed: a generator's
    state for all parameters would take more memory than they do, and the result depends on no mesh.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    noise = _place_hash(x.shape, seed) >> 16
    rounded = (bits + noise) & jnp.uint32(0xFFFF0000)
    rounded = jnp.where(jnp.isfinite(x), rounded, bits)  # a carry would turn them into others
    return jax.lax.bitcast_convert_type(rounded, jnp.float32).astype(jnp.bfloat16)


def _place_hash(shape: tuple[int, ...], seed: Seed) -> UInt32[Array, "*shape"]:
    value = jnp.broadcast_to(seed, shape)
    for axis in range(len(shape)):
        value = _mixed(value ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis))
    return value if shape else _mixed(value)


def _mixed(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """A bijection of 32 bits in which every bit depends on every other (murmur3's finaliser)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def stored_like(tree: Any, like: Any, step: Any, salt: int) -> Any:
    """Leaves in the dtypes of `like`; those that get narrower are rounded stochastically."""
    leaves, structure = jax.tree.flatten(tree)
    kept = [
        round_stochastically(x, seed_of(salt, step, place))
        if old.dtype == jnp.bfloat16 and x.dtype == jnp.float32
        else x.astype(old.dtype)
        for place, (x, old) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))
    ]
    return jax.tree.unflatten(structure, kept)


def apply_updates(params: Any, updates: Any, step: Array) -> Any:
    """`params + updates`, summed in float32 and stored in the dtypes of `params`."""
    sums = jax.tree.map(lambda p, u: p.astype(jnp.float32) + u, params, updates)
    return stored_like(sums, params, step, salt=0)
