"""What XLA's CPU compiler runs faster in another form; accelerators take none of it.

Each function is the CPU's form of an operation that its owner defines and chooses between by
platform. What was measured stands in `benchmarks/NOTES.md` (jaxlib 0.10.2); a form is here because
it takes about a tenth or more off a whole step or answer.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mis_jax.model.attention import row_index, segment_mask
from mis_jax.model.matmul import matmul_fp32_accum

_QUERIES = 512  # of a block of attention
_SMALL, _PARTS = 2**16, 64  # numbers that are summed at once; parts of a matrix


def matmul_weight_first(default: Callable[[Array, Array], Array], table: Array, rows: Array):
    """`table @ rows.T`, transposed, of few rows.

    bfloat16 products with a single row are thirty times as slow as with two. Those of float32 with
    2 to 32 rows read a table of two halves (a batch of two products) twice as fast as a whole one.
    """
    count, (out_size, in_size) = rows.shape[0], table.shape
    if count == 1 and table.dtype == jnp.bfloat16:
        return default(table, jnp.concatenate([rows, rows]))[:1]
    halves = table.dtype == jnp.float32 or in_size > out_size
    if not halves or not 1 < count <= 32 or out_size % 2:
        return default(table, rows)
    y_2OR = jax.lax.dot_general(
        table.reshape(2, out_size // 2, in_size),
        jnp.broadcast_to(rows, (2, *rows.shape)),
        (((2,), (2,)), ((0,), (0,))),
        preferred_element_type=jnp.float32,
    )
    return y_2OR.reshape(out_size, count).T


def gather_rows(default: Callable[[Array, Array], Array], table_VD: Array, ids_BT: Array) -> Array:
    """Rows of a table; XLA would gather from a float32 copy of one in bfloat16."""
    if table_VD.dtype != jnp.bfloat16:
        return default(table_VD, ids_BT)
    bits_VD = jax.lax.bitcast_convert_type(table_VD, jnp.uint16)
    return jax.lax.bitcast_convert_type(default(bits_VD, ids_BT), table_VD.dtype)


def write_tokens(
    default: Callable[[Array, Array, Array], Array],
    slots_BKSH: Array,
    new_BKH: Array,
    positions_B: Array,
) -> Array:
    """One token into every slot of a cache; XLA would scatter into a float32 copy of bfloat16."""
    if slots_BKSH.dtype != jnp.bfloat16:
        return default(slots_BKSH, new_BKH, positions_B)
    here_BS = jnp.arange(slots_BKSH.shape[2]) == positions_B[:, None]
    return jnp.where(here_BS[:, None, :, None], new_BKH[:, :, None], slots_BKSH)


def attend_by_head(
    query_BTNH: Float[Array, "batch length heads head_dim"],
    key_BTKH: Float[Array, "batch length kv_heads head_dim"],
    value_BTKH: Float[Array, "batch length kv_heads head_dim"],
    segment_ids: Int[Array, "batch length"] | None,
) -> Float[Array, "batch length heads head_dim"]:
    """`attend_xla` one head after the other, so that a head's map stays in the processor's cache.

    Tokens that see only earlier ones go in blocks, and no block looks past its end. The backward
    pass computes a head's map again, so that none is ever kept.
    """
    key_BKTH, value_BKTH = key_BTKH.swapaxes(1, 2), value_BTKH.swapaxes(1, 2)
    if segment_ids is None:
        return by_head(query_BTNH, key_BKTH, value_BKTH, None)
    index, length, outputs = row_index(segment_ids), query_BTNH.shape[1], []
    for start in range(0, length, _QUERIES):  # tokens see none that come after their block
        stop = min(start + _QUERIES, length)
        own, seen = slice(start, stop), slice(0, stop)
        mask = segment_mask(
            segment_ids[:, own], segment_ids[:, seen], index[:, own], index[:, seen]
        )
        keys_BKSH, values_BKSH = key_BKTH[:, :, seen], value_BKTH[:, :, seen]
        outputs.append(by_head(query_BTNH[:, own], keys_BKSH, values_BKSH, mask[:, 0]))
    return jnp.concatenate(outputs, axis=1)


def by_head(
    query_BTNH: Float[Array, "batch queries heads head_dim"],
    key_BKSH: Float[Array, "batch kv_heads keys head_dim"],
    value_BKSH: Float[Array, "batch kv_heads keys head_dim"],
    mask_BTS: Bool[Array, "batch queries keys"] | None,
) -> Float[Array, "batch queries heads head_dim"]:
    """`grouped_attention` one head after the other."""
    batch, queries, heads, head_dim = query_BTNH.shape
    group = heads // key_BKSH.shape[1]

    @jax.checkpoint
    def attend(one):
        q_TH, k_SH, v_SH, row = one
        logits_TS = matmul_fp32_accum(q_TH, k_SH.T) * head_dim**-0.5
        if mask_BTS is not None:
            logits_TS = jnp.where(mask_BTS[row], logits_TS, jnp.finfo(jnp.float32).min)
        weights_TS = jax.nn.softmax(logits_TS).astype(v_SH.dtype)
        return matmul_fp32_accum(weights_TS, v_SH).astype(q_TH.dtype)

    flat = (batch * heads, -1, head_dim)
    out = jax.lax.map(
        attend,
        (
            query_BTNH.swapaxes(1, 2).reshape(flat),
            jnp.repeat(key_BKSH, group, axis=1).reshape(flat),
            jnp.repeat(value_BKSH, group, axis=1).reshape(flat),
            jnp.repeat(jnp.arange(batch), heads),
        ),
    )
    return out.reshape(batch, heads, queries, head_dim).swapaxes(1, 2)


def sum_of_squares(x: Array) -> Array:
    """Of all numbers, in float32; XLA's reductions read 2 GB/s, sums of whole parts 20."""
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
