"""Programs compiled for absent hardware, and their memory by kind; too large is a finding."""

import math
import re
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax

from mis_jax.plan.gpu import as_if_present
from mis_jax.plan.topology import Topology

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"\(?([\d.]+)([KMGT]?)i?B?\)?"
# What the compilers say of a program that does not fit: what it needs, arguments included (also
# where they call it "temporaries"), and what there is.
_TOO_LARGE = (
    re.compile(rf"Ran out of memory.*? {_SIZE} exceeds available HBM {_SIZE}", re.S),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm", re.S),
)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device (`host`: in its host's memory).

    `total` is the most that is there at one time; temporaries that share no time add up to more.
    """

    arguments: float  # state and batch
    temporaries: float
    output: float  # what is not written over an argument
    code: float
    host: float
    total: float
    limit: float

    @property
    def left(self) -> float:
        return self.limit - self.total

    @property
    def fits(self) -> bool:
        return self.left >= 0


@dataclass(frozen=True)
class Compiled:
    """A program compiled for a topology; without `text` the compiler gave up for lack of memory."""

    memory: Memory
    text: str | None
    seconds: float


def compile_for(topology: Topology, jitted: Any, *arguments: Any) -> Compiled:
    """Lower and compile; arguments are shapes with their places."""
    began = time.monotonic()
    limit = topology.chip.memory
    try:
        with nullcontext() if topology.is_tpu else as_if_present():
            program = jitted.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        total, available = needed
        given = _bytes_of(arguments)
        memory = Memory(given, max(total - given, 0.0), 0, 0, 0, total, available)
        return Compiled(memory, None, time.monotonic() - began)
    found = program.memory_analysis()
    sums = (
        found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )
    memory = Memory(
        arguments=found.argument_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        output=found.output_size_in_bytes - found.alias_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        host=found.host_argument_size_in_bytes
        + found.host_temp_size_in_bytes
        + found.host_output_size_in_bytes
        - found.host_alias_size_in_bytes,
        total=found.generated_code_size_in_bytes + (found.peak_memory_in_bytes or sums),
        limit=limit,
    )
    return Compiled(memory, program.as_text(), time.monotonic() - began)


def _needed(message: str) -> tuple[float, float] | None:
    """Bytes needed in all and available, by a compiler's refusal; None for another error."""
    for pattern in _TOO_LARGE:
        if found := pattern.search(message):
            needed, unit, available, available_unit = found.groups()
            return float(needed) * _UNITS[unit], float(available) * _UNITS[available_unit]
    return None


def _bytes_of(arguments: Any) -> float:
    """Bytes of the arguments' shards on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(arguments)
        if getattr(x.sharding, "memory_kind", None) != "pinned_host"
    )
