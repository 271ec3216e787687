"""What a stage is about to ask for, in words, before it does."""

from __future__ import annotations

from collections.abc import Sequence

from mis_jax.evals.types import Benchmark, Sample


def answers_ahead(benchmark: Benchmark, samples: Sequence[Sample]) -> str:
    """What the answers of a benchmark can take at most."""
    n, pictures = len(samples), sum(len(sample.images) for sample in samples)
    tokens = n * benchmark.max_new_tokens
    return (
        f"{benchmark.name}: {n:,} samples with {pictures:,} pictures, "
        f"at most {tokens:,} tokens of answers"
    )


def verdicts_ahead(
    name: str,
    judge: str,
    calls: int,
    tokens: int,
    pictures: int,
    seconds: float,
) -> str:
    """What the verdicts of a benchmark will take of a judge that is paid for."""
    if not calls:
        return f"{name}: nothing to judge with {judge}"
    return (
        f"{name}: {calls:,} calls of {judge}, about {tokens:,} tokens of text and "
        f"{pictures:,} pictures; about {_duration(seconds)}"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
