"""How the network is run, as opposed to what it computes.

`model/` knows no mesh and no accelerator. What depends on them comes in from outside: where an
activation lies (`constrain`), how a parameter that is stored in shards is brought together
(`gather`), which kernel attends (`attend`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mis_jax.model.attention import attend_xla

Axes = tuple[str | None, ...]
Remat = Literal["none", "full", "dots", "attention", "offload"]
#: (queries, keys, values, segment ids) -> output. With segment ids a token sees earlier tokens of
#: its own segment, without them everything.
Attend = Callable[
    [
        Float[Array, "batch length heads head_dim"],
        Float[Array, "batch length kv_heads head_dim"],
        Float[Array, "batch length kv_heads head_dim"],
        Int[Array, "batch length"] | None,
    ],
    Float[Array, "batch length heads head_dim"],
]
Constrain = Callable[..., jax.Array]  # (activation, logical name of each axis) -> activation
Gather = Callable[[jax.Array, Axes, jnp.dtype], jax.Array]  # (parameter, its axes, compute dtype)


def anywhere(x: jax.Array, *names: str | None) -> jax.Array:
    """Activations lie where the compiler puts them."""
    return x


def as_stored(parameter: jax.Array, axes: Axes, dtype: jnp.dtype) -> jax.Array:
    """Parameters are used as they are stored; a layer casts its kernel itself."""
    return parameter


@dataclass(frozen=True)
class Execution:
    """Choices that leave results alone, up to rounding (and, with `drop_path`, up to chance)."""

    remat: Remat = "none"  # what the backward pass computes again instead of keeping
    unroll: bool = False  # layers are written out, not scanned
    attend: Attend = attend_xla
    attend_tiles: Attend = attend_xla  # of the vision tower
    constrain: Constrain = anywhere
    gather: Gather = as_stored
    drop_path: float = 0.0  # largest chance that a branch of a vision layer is left out


PLAIN = Execution()
