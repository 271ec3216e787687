"""A fingerprint of parameters where they lie: the same on every mesh and number of processes.

Sums of whole numbers do not depend on their order, and every value counts with its place. Nothing
moves but a number for each array: it costs one reading of the memory.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt32

from mis_jax.storage.hashing import digest

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_GOLDEN = 0x9E3779B1  # odd, so that places differ; the rest is the finalizer of MurmurHash3


def fingerprint(arrays: dict[str, jax.Array]) -> str:
    """Of names, shapes, dtypes and every bit of the values."""
    sums = jax.device_get(jax.jit(lambda x: {name: _sum(x[name]) for name in x})(arrays))
    return digest(
        {name: [list(x.shape), str(x.dtype), int(sums[name])] for name, x in arrays.items()}
    )[:16]


def _sum(x: jax.Array) -> UInt32[Array, ""]:
    if x.dtype in (jnp.int4, jnp.uint4):  # kernels under QLoRA; two of them share a byte
        x = x.astype(jnp.int8)
    bits = lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = int(np.prod(x.shape[axis + 1 :], dtype=np.int64)) % 2**32
        place += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride)
    mixed = bits ^ (place * np.uint32(_GOLDEN))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
