"""Next-token loss on weighted tokens, without the logits of all tokens.

A vocabulary of 92,553 words makes the logits of 8,192 tokens 3 GB, and answers are a fraction of
the tokens. So the positions with loss are gathered first, and logits are made of a chunk of them at
a time. Loss and gradient are computed together, in the forward pass, so no logits are kept and the
number of chunks may depend on the data: positions without loss cost nothing.

Shape suffixes: B rows, T length, C chunk, D width, V rows of the table.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mis_jax.model.batch import Batch
from mis_jax.model.execution import Constrain, anywhere


def weighted_loss(
    hidden_BTD: Float[Array, "batch length width"],
    table_VD: Float[Array, "rows width"],
    batch: Batch,
    *,
    vocab: int | None = None,
    chunk: int = 1024,
    constrain: Constrain = anywhere,
    place_table: Any = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of weighted losses and sum of weights; their ratio is the loss of a batch.

    The two are returned apart so that accumulated and sharded batches are divided once, by the
    weight of all their tokens. The logits of a position are `hidden @ table.T`, float32; rows of
    the table from `vocab` on are no tokens. `chunk` positions of every row are taken at once, or a
    quarter of a short row, as answers are a part of it; `place_table` says where the gradient of
    the table lies while chunks are added up.
    """
    targets_BT = jnp.roll(batch.input_ids, -1, axis=1)  # entry t is about token t + 1
    weights_BT = jnp.roll(batch.loss_weights, -1, axis=1).at[:, -1].set(0.0)
    length = hidden_BTD.shape[1]
    vocab, chunk = vocab or table_VD.shape[0], min(chunk, length, max(_SHORTEST, -(-length // 4)))
    rule = (vocab, chunk, constrain, place_table)
    total: Any = _total(rule, hidden_BTD, table_VD, targets_BT, weights_BT.astype(jnp.float32))
    return total, jnp.sum(weights_BT)


_SHORTEST = 128  # positions of a chunk, the rows that a matrix unit takes
_Rule = tuple[int, int, Constrain, Any]  # vocab, chunk, constrain, place_table: no arrays


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(rule: _Rule, hidden_BTD, table_VD, targets_BT, weights_BT) -> Float[Array, ""]:
    return _chunks(rule, hidden_BTD, table_VD, targets_BT, weights_BT, False, False)[0]


def _forward(rule, hidden_BTD, table_VD, targets_BT, weights_BT):
    wanted = hidden_BTD.perturbed, table_VD.perturbed  # a frozen table needs no gradient
    arrays = (x.value for x in (hidden_BTD, table_VD, targets_BT, weights_BT))
    total, of_hidden, of_table = _chunks(rule, *arrays, *wanted)  # type: ignore[call-arg]
    return total, (of_hidden, of_table)


def _backward(rule, gradients, of_total):
    def scaled(gradient):
        return None if gradient is None else (gradient * of_total).astype(gradient.dtype)

    return *(scaled(gradient) for gradient in gradients), None, None


_total.defvjp(_forward, _backward, symbolic_zeros=True)


# Row by row, so that rows stay on their devices.
_taken = jax.vmap(lambda row, positions: row[positions])
_added = jax.vmap(lambda row, positions, more: row.at[positions].add(more))


def _chunks(
    rule: _Rule,
    hidden_BTD: Float[Array, "batch length width"],
    table_VD: Float[Array, "rows width"],
    targets_BT: Int[Array, "batch length"],
    weights_BT: Float[Array, "batch length"],
    hidden_wanted: bool,
    table_wanted: bool,
) -> tuple[Array, Array | None, Array | None]:
    """The loss and its gradients by `hidden` and by the table."""
    vocab, chunk, constrain, place_table = rule
    length = hidden_BTD.shape[1]
    whole_VD = constrain(table_VD.astype(hidden_BTD.dtype), "vocab", None)
    # Positions with loss first, in their order; a last chunk may run over the end.
    order_BT = jnp.argsort(weights_BT <= 0, axis=1, stable=True).astype(jnp.int32)
    order_BT = jnp.pad(order_BT, ((0, 0), (0, -length % chunk)), constant_values=length - 1)
    count = jnp.max(jnp.sum(weights_BT > 0, axis=1))
    column_V = jnp.arange(table_VD.shape[0])

    def one(carry):
        number, total, of_hidden_BTD, of_table_VD = carry
        place_BC = jax.lax.dynamic_slice_in_dim(order_BT, number * chunk, chunk, 1)
        weight_BC = _taken(weights_BT, place_BC)
        target_BC1 = _taken(targets_BT, place_BC)[..., None]
        h_BCD = constrain(_taken(hidden_BTD, place_BC), "rows", "length", None)
        logits_BCV = jnp.einsum("bcd,vd->bcv", h_BCD, whole_VD, preferred_element_type=jnp.float32)
        logits_BCV = constrain(logits_BCV, "rows", "length", "vocab")
        logits_BCV = jnp.where(column_V < vocab, logits_BCV, jnp.finfo(jnp.float32).min)
        log_sum_BC1 = jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)
        is_target_BCV = column_V == target_BC1
        hit_BC = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0), axis=-1)
        total += jnp.sum(weight_BC * (log_sum_BC1[..., 0] - hit_BC))
        if hidden_wanted or table_wanted:
            slope_BCV = jnp.exp(logits_BCV - log_sum_BC1) - is_target_BCV
            slope_BCV = (slope_BCV * weight_BC[..., None]).astype(h_BCD.dtype)
        if hidden_wanted:
            of_h_BCD = jnp.einsum(
                "bcv,vd->bcd", slope_BCV, whole_VD, preferred_element_type=jnp.float32
            )
            # The positions that fill up the last chunk have weight 0 and add nothing.
            of_hidden_BTD = _added(of_hidden_BTD, place_BC, of_h_BCD.astype(h_BCD.dtype))
        if table_wanted:
            of_table_VD += jnp.einsum(
                "bcv,bcd->vd", slope_BCV, h_BCD, preferred_element_type=jnp.float32
            )
            if place_table is not None:
                of_table_VD = jax.lax.with_sharding_constraint(of_table_VD, place_table)
        return number + 1, total, of_hidden_BTD, of_table_VD

    start = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((), jnp.float32),
        jnp.zeros_like(hidden_BTD) if hidden_wanted else None,
        jnp.zeros(table_VD.shape, jnp.float32) if table_wanted else None,
    )
    _, total, of_hidden_BTD, of_table_VD = jax.lax.while_loop(
        lambda carry: carry[0] * chunk < count, one, start
    )
    if of_table_VD is not None:
        of_table_VD = of_table_VD.astype(table_VD.dtype)
    return total, of_hidden_BTD, of_table_VD
