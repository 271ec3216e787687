"""Every benchmark by its id. A new one is a file beside this one that holds `BENCHMARKS`."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from mis_jax.evals.types import Benchmark


def _found() -> dict[str, Benchmark]:
    """What the files of this folder define, in the order of their names."""
    found: dict[str, Benchmark] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        defined = getattr(import_module(f"{__name__}.{module.name}"), "BENCHMARKS", ())
        for benchmark in defined:
            assert benchmark.name not in found, f"two benchmarks are called {benchmark.name}"
            found[benchmark.name] = benchmark
    return found


BENCHMARKS: dict[str, Benchmark] = _found()


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
