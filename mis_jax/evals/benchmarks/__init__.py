"""Every benchmark by its id: a new one is a file beside this one and an entry here."""

from __future__ import annotations

from mis_jax.evals.benchmarks.mini import MINI_BENCHMARKS
from mis_jax.evals.benchmarks.mis import MIS_BENCHMARKS
from mis_jax.evals.types import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (*MINI_BENCHMARKS, *MIS_BENCHMARKS)
}


def get_benchmark(name: str) -> Benchmark:
    """A benchmark by id, or a ``ValueError`` that lists the known ones."""
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark {name!r} is unknown; --benchmarks takes {_known()}")
    return BENCHMARKS[name]


def _known() -> str:
    return ", ".join(BENCHMARKS)


def size_note(name: str, n: int) -> str | None:
    """A sentence for a set whose size is not the published one: reported, never refused."""
    published = BENCHMARKS[name].published_size
    if published is None or published == n:
        return None
    return f"{name} has {n} samples here; the published set has {published}."
