"""How the next token is chosen from its logits.

Shape suffixes: B batch, V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0. `top_p` 1 and `top_k` 0 leave the distribution as it is."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; give a number of at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a number above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; give 0 (off) or a number of tokens")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; give a number from 0 to 2**32 - 1")


def slot_keys(
    seeds: UInt32[Array, " batch"], streams: UInt32[Array, " batch"], steps: Int[Array, " batch"]
) -> Key[Array, " batch"]:
    """Random keys of a token of every slot: of its own seed, stream and step, and nothing else."""

    def key(seed, stream, step):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)

    return jax.vmap(key)(seeds, streams, steps)


def sample(
    logits_BV: Float[Array, "batch vocab"],
    keys: Key[Array, " batch"],
    temperature: Float[Array, ""] | Float[Array, " batch"] | float,
    top_p: Float[Array, ""] | Float[Array, " batch"] | float,
    top_k: Int[Array, ""] | Int[Array, " batch"] | int,
) -> Int[Array, " batch"]:
    """Next token of every slot; the settings may differ from slot to slot.

    First the temperature, then `top_k`, then `top_p` of what is left, as in transformers.
    """
    batch = logits_BV.shape[:1]
    temperature_B = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), batch)
    top_p_B = jnp.broadcast_to(jnp.asarray(top_p, jnp.float32), batch)
    top_k_B = jnp.broadcast_to(jnp.asarray(top_k, jnp.int32), batch)
    logits_BV = logits_BV.astype(jnp.float32)
    best_B = best(logits_BV)

    def draw():
        below_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)  # never overflows
        scaled_BV = below_BV / jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]
        kept_BV = jax.lax.cond(
            jnp.any((top_k_B > 0) | (top_p_B < 1)),
            lambda: jnp.where(_kept(scaled_BV, top_p_B, top_k_B), scaled_BV, -jnp.inf),
            lambda: scaled_BV,
        )
        drawn_B = jax.vmap(jax.random.categorical)(keys, kept_BV).astype(jnp.int32)
        return jnp.where(temperature_B > 0, drawn_B, best_B)

    return jax.lax.cond(jnp.any(temperature_B > 0), draw, lambda: best_B)


def best(logits_BV: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """The first of the largest logits. As two plain reductions, which XLA vectorises on a CPU."""
    vocab = logits_BV.shape[-1]
    largest_B1 = logits_BV.max(axis=-1, keepdims=True)
    ids_BV = jnp.where(logits_BV == largest_B1, jnp.arange(vocab, dtype=jnp.int32), vocab - 1)
    return ids_BV.min(axis=-1)


def _kept(logits_BV, top_p_B, top_k_B):
    """Which tokens `top_k` and `top_p` leave; of equal logits the lower id counts as the better."""
    vocab = logits_BV.shape[-1]
    order_BV = jnp.argsort(logits_BV, axis=-1, stable=True, descending=True)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    limit_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, vocab), vocab)
    in_top_k_BV = jnp.arange(vocab) < limit_B[:, None]
    share_BV = jax.nn.softmax(jnp.where(in_top_k_BV, sorted_BV, -jnp.inf), axis=-1)
    better_BV = jnp.cumsum(share_BV, axis=-1) - share_BV  # probability of all better tokens
    # top_p 1 must not lose a token to the rounding of the sum
    in_top_p_BV = (better_BV < top_p_B[:, None]) | (top_p_B >= 1)[:, None]
    count_B1 = jnp.maximum(jnp.sum(in_top_k_BV & in_top_p_BV, axis=-1, keepdims=True), 1)
    worst_B1 = jnp.take_along_axis(sorted_BV, count_B1 - 1, axis=-1)
    worst_id_B1 = jnp.take_along_axis(order_BV, count_B1 - 1, axis=-1)
    tied_BV = (logits_BV == worst_B1) & (jnp.arange(vocab) <= worst_id_B1)
    return (logits_BV > worst_B1) | tied_BV
