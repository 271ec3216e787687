"""When the device's memory is not enough: whose request it was, and what is left."""

from collections.abc import Iterable
from typing import Any

import jax

from mis_jax.inference.sequence import ActiveSequence

_SIGNS = ("resource_exhausted", "out of memory", "out_of_memory")


class OutOfMemory(RuntimeError):
    """One request needs more memory than there is; it has ended, and the engine goes on."""

    def __init__(self, running: ActiveSequence):
        tiles = len(running.request.example.tiles)
        super().__init__(
            f"a prompt of {running.prompt} tokens with {tiles} tiles and {len(running.tokens)} "
            "tokens of its answer need more memory than there is beside the model; shorten it, "
            "send fewer or smaller images or ask for fewer tokens"
        )
        self.ticket = running.ticket


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on the device, in its compiler or on the host."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in text for sign in _SIGNS)


def largest(running: Iterable[ActiveSequence]) -> ActiveSequence:
    """The one that needs most of the cache; of two the newer."""
    return max(running, key=lambda r: (r.cache_length, r.ticket))


def is_alive(arrays: Any) -> bool:
    """Whether these arrays hold values: none was given away to, or made by, what failed."""
    leaves = jax.tree.leaves(arrays)
    if any(leaf.is_deleted() for leaf in leaves):
        return False
    try:
        jax.block_until_ready(leaves)
    except jax.errors.JaxRuntimeError:  # work is queued: it fails when it is waited for
        return False
    return True
