"""Which attention kernel a mesh gets, and how it is spread over the devices."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from mis_jax.model.attention import attend_xla
from mis_jax.model.execution import Attend
from mis_jax.model.xla_cpu import attend_by_head

Kernel = Literal["xla", "cudnn", "splash", "by_head"]
_TILE_AXES = ("data", "fsdp", "context")


def choose(wanted: str, mesh: Mesh, compute_dtype: jnp.dtype) -> Kernel:
    """The kernel asked for, or the best one; ValueError where the devices do not have it."""
    platform = mesh.devices.flat[0].platform
    split = mesh.shape["context"] > 1
    if wanted == "auto":
        if platform == "tpu":
            return "splash"
        if platform == "cpu" and mesh.size == 1:
            return "by_head"
        narrow = compute_dtype == jnp.bfloat16
        return "cudnn" if platform in ("cuda", "gpu") and narrow and not split else "xla"
    if wanted == "cudnn" and (platform not in ("cuda", "gpu") or compute_dtype != jnp.bfloat16):
        raise ValueError(
            f"train.attention is cudnn, which is for bfloat16 on NVIDIA GPUs, not {compute_dtype} "
            f"on {platform}; set it to auto"
        )
    if wanted == "cudnn" and split:
        raise ValueError("train.attention cudnn does not split sequences; set mesh.context to 1")
    if wanted == "splash" and platform not in ("tpu", "cpu"):
        raise ValueError(f"train.attention is splash, which is for TPUs, not {platform}")
    assert wanted in ("xla", "cudnn", "splash"), wanted
    return wanted  # type: ignore[return-value]


def attend_on(mesh: Mesh, kernel: Kernel, *, packed: bool) -> tuple[Attend, Attend]:
    """Attention of the decoder and of the vision tower."""
    if kernel == "xla":
        return attend_xla, attend_xla
    if kernel == "by_head":
        return attend_by_head, attend_by_head
    if kernel == "cudnn":
        from mis_jax.parallel.attention_cudnn import attend_cudnn, attend_cudnn_packed

        return (attend_cudnn_packed if packed else attend_cudnn), attend_cudnn
    device = mesh.devices.flat[0]
    options = dict(
        mesh=mesh,
        # The v6e's matrix unit is four times the v5e's.
        largest_block=2048 if "v6" in device.device_kind else 1024,
        interpret=device.platform == "cpu",
    )
    return (
        partial(_splash, rows=("data", "fsdp"), length="context", **options),
        partial(_splash, rows=_TILE_AXES, length=None, **options),
    )


def _splash(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Int[Array, "batch length"] | None,
    *,
    mesh: Mesh,
    rows: tuple[str, ...],
    length: str | None,
    largest_block: int,
    interpret: bool,
) -> Array:
    """Splash attention; every device has some rows, some heads and part of the queries."""
    from mis_jax.parallel import attention_splash as splash

    count, tokens, heads, _ = query.shape
    kv_heads = key.shape[2]
    while rows and count % np.prod([mesh.shape[axis] for axis in rows]):
        rows = rows[:-1]  # such as tiles that do not divide over `context` too
    shards = mesh.shape[length] if length else 1
    padded = splash.padded_length(tokens)
    if padded % (128 * shards):
        padded = -(-tokens // (128 * shards)) * 128 * shards
    head_axis = "tensor" if heads % mesh.shape["tensor"] == 0 else None
    tensor = mesh.shape["tensor"] if head_axis else 1
    if kv_heads % tensor:  # fewer key heads than shards: each shard gets a copy of its own
        repeats = int(np.lcm(kv_heads, tensor)) // kv_heads
        if heads % (kv_heads * repeats):
            head_axis, tensor, repeats = None, 1, 1
        key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    kernel = splash.make_kernel(
        heads,
        padded,
        causal=segment_ids is not None,
        largest_block=largest_block,
        head_shards=tensor,
        length_shards=shards,
        interpret=interpret,
    )
    if segment_ids is None:
        segments: Any = jnp.asarray(splash.whole_segments(count, tokens, padded))
    else:
        segments = splash.pad_length(segment_ids, padded)
    query, key, value = (splash.pad_length(x, padded) for x in (query, key, value))
    queries, keys = P(rows or None, length, head_axis), P(rows or None, None, head_axis)
    kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, P(head_axis, length)))
    out = jax.shard_map(
        splash.run_kernel,
        mesh=mesh,
        in_specs=(kernel_spec, queries, keys, keys, P(rows or None, length), P(rows or None)),
        out_specs=queries,
        check_vma=False,
    )(kernel, query, key, value, segments, segments)
    return out[:, :tokens]
