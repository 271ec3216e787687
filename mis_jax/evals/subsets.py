"""A part of a benchmark: its first samples, or one host's share of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mis_jax.evals.types import Sample


@dataclass(frozen=True)
class Part:
    """The first ``limit`` samples, and of those every ``shards``-th, from number ``shard`` on.

    Neighbours in a file are alike, so every shard has some of everything.
    """

    limit: int | None = None
    shard: int = 1
    shards: int = 1

    def of(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples of this part."""
        return list(samples)[: self.limit][self.shard - 1 :: self.shards]

    def described(self, size: int) -> dict[str, Any] | None:
        """What a manifest says of it; ``size`` is the whole set's. None for the whole."""
        if self == Part():
            return None
        return {"limit": self.limit, "shard": self.shard, "shards": self.shards, "of": size}


def part_from(limit: int | None, shard: str | None) -> Part:
    """The part that ``--limit`` and ``--shard i/n`` mean."""
    if limit is not None and limit < 1:
        raise ValueError(f"--limit is {limit}; give at least 1")
    if shard is None:
        return Part(limit)
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--shard is {shard!r}; write i/n with i from 1 to n, such as 1/4")
    return Part(limit, int(match[1]), int(match[2]))
