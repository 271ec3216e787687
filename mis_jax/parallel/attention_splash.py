"""Attention by the splash kernel of JAX's Pallas library, for TPUs.

Blocks that the causal mask empties are skipped; samples of a packed row are told by segment ids.
Shape suffixes: B rows, T length, N heads, K kv heads, H head dim.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jaxtyping import Array, Int

from mis_jax.model.layers import ATTENTION_OUTPUT

_LANES = 128  # what a block's sides are multiples of


def padded_length(length: int) -> int:
    """Length that the kernel works on."""
    return -(-length // _LANES) * _LANES


def make_kernel(
    heads: int,
    length: int,
    *,
    causal: bool,
    largest_block: int,
    head_shards: int = 1,
    length_shards: int = 1,
    interpret: bool = False,
) -> splash_attention_kernel.SplashAttentionKernel:
    """The kernel for rows of `length` (a multiple of 128) of which a device has a shard.

    Large blocks keep the matrix unit busy: the library's own of 128 reach a twentieth of a chip.
    """
    block = _block(length // length_shards, largest_block)
    block_kv = _block(length, largest_block)
    compute = _block(block_kv, largest_block // 2)  # must divide block_kv: 1,152 of a tile by 384
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block_kv,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )
    mask = splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask((length, length)) for _ in range(heads)]),
        block_sizes=sizes,
        head_shards=head_shards,
        q_seq_shards=length_shards,
        residual_checkpoint_name=ATTENTION_OUTPUT,
        interpret=interpret,
    )


def _block(length: int, largest: int) -> int:
    """The largest multiple of 128 up to `largest` that divides a length."""
    return max(b for b in range(_LANES, largest + 1, _LANES) if length % b == 0)


def run_kernel(
    kernel,
    query_BTNH,
    key_BTKH,
    value_BTKH,
    query_segments: Int[Array, "batch queries"],
    key_segments: Int[Array, "batch keys"],
):
    """Attention of a device's rows, heads and part of the sequence."""
    scaled = (query_BTNH.astype(jnp.float32) * query_BTNH.shape[-1] ** -0.5).astype(
        query_BTNH.dtype
    )
    q, k, v = (x.swapaxes(1, 2) for x in (scaled, key_BTKH, value_BTKH))
    segments = splash_attention_kernel.SegmentIds(query_segments, key_segments)
    return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)


def pad_length(x: Array, to: int) -> Array:
    """Zeros after the end of axis 1."""
    return jnp.pad(x, [(0, 0), (0, to - x.shape[1]), *((0, 0) for _ in x.shape[2:])])


def whole_segments(rows: int, length: int, padded: int) -> Int[np.ndarray, "rows padded"]:
    """One sample a row, such as the patches of a tile, and padding."""
    return np.broadcast_to((np.arange(padded) < length).astype(np.int32), (rows, padded))
