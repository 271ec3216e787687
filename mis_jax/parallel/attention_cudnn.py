"""Attention by cuDNN's fused kernels, for bfloat16 on NVIDIA GPUs.

No mask is ever given: a mask makes the kernel two to three times slower. Padded rows are told by
their lengths; packed rows (Hopper and later) by where each sample begins, which JAX offers under a
private name alone. What lies outside all samples is never written by the kernel, so it is set to
zero on the way in (its gradient) and on the way out.

Shape suffixes: B rows, T length, N heads, K kv heads, H head dim, M samples.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mis_jax.model.batch import MAX_SEGMENTS


def attend_cudnn(query_BTNH, key_BTKH, value_BTKH, segment_ids: Int[Array, "batch length"] | None):
    """`Attend` for rows of one sample each, padded on the right, and for tiles."""
    causal = segment_ids is not None
    rows, length = query_BTNH.shape[:2]
    if segment_ids is None:
        segment_ids = jnp.ones((rows, length), jnp.int32)
    q, k, v, real_BT11, segment_ids = _prepared(query_BTNH, key_BTKH, value_BTKH, segment_ids)
    lengths_B = jnp.sum(segment_ids > 0, axis=1, dtype=jnp.int32)
    out_BTNH = jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=causal,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        implementation="cudnn",
    )
    return jnp.where(real_BT11, out_BTNH, 0)[:, :length]


def attend_cudnn_packed(
    query_BTNH, key_BTKH, value_BTKH, segment_ids: Int[Array, "batch length"] | None
):
    """`Attend` for rows of up to `MAX_SEGMENTS` samples."""
    assert segment_ids is not None
    # Not in jax.nn.dot_product_attention as of jax 0.12.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    length = query_BTNH.shape[1]
    q, k, v, real_BT11, segment_ids = _prepared(query_BTNH, key_BTKH, value_BTKH, segment_ids)
    starts, lengths = segment_places(segment_ids)
    out_BTNH: Any = dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=starts,
        kv_offsets=starts,
        scale=query_BTNH.shape[-1] ** -0.5,
        mask_type=MaskType.PADDING_CAUSAL,
    )
    return jnp.where(real_BT11, out_BTNH, 0)[:, :length]


def _prepared(query_BTNH, key_BTKH, value_BTKH, segment_ids):
    """Inputs of an even length (JAX refuses to train on InternViT's 1,025), zero on padding."""
    odd = [(0, 0), (0, segment_ids.shape[1] % 2)]
    segment_ids = jnp.pad(segment_ids, odd)
    real_BT11 = (segment_ids > 0)[..., None, None]
    qkv = (
        jnp.where(real_BT11, jnp.pad(x, [*odd, (0, 0), (0, 0)]), 0)
        for x in (query_BTNH, key_BTKH, value_BTKH)
    )
    return *qkv, real_BT11, segment_ids


def segment_places(
    segment_ids: Int[Array, "batch length"], most: int = MAX_SEGMENTS
) -> tuple[Int[Array, "batch most+1"], Int[Array, "batch most"]]:
    """Where every sample of a row begins, and its length; -1 for those that a row does not have."""
    numbers_M11 = jnp.arange(1, most + 1)[:, None, None]
    lengths_BM = jnp.sum(segment_ids == numbers_M11, axis=-1, dtype=jnp.int32).T
    starts_BM = jnp.cumsum(lengths_BM, axis=1) - lengths_BM
    there_BM = lengths_BM > 0
    starts_BM = jnp.where(there_BM, starts_BM, -1)
    return jnp.pad(starts_BM, ((0, 0), (0, 1)), constant_values=-1), jnp.where(
        there_BM, lengths_BM, -1
    )
