"""Refusal phrases beside the judge: how often they occur, and how far the two agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mis_jax.evals.benchmarks import get_benchmark
from mis_jax.evals.judges.keywords import agreement, is_keyword_refusal
from mis_jax.evals.scoring import Run
from mis_jax.evals.stats import Agreement, kappa, rate


@dataclass(frozen=True)
class Refusals:
    """Refusal phrases of one run on one benchmark.

    ``cells`` is the two-by-two table with the judge's word on refusing, None where the judge's
    labels do not speak of it (a guard model says safe or unsafe, no more).
    """

    benchmark: str
    label: str
    number: int
    rate: dict[str, Any]
    cells: dict[str, int] | None
    agreement: Agreement | None


def refusals(runs: Sequence[Run], benchmark: str) -> list[Refusals]:
    """One line for each run that answered; none for sets whose answers are right or wrong."""
    if get_benchmark(benchmark).judging == "correct":
        return []
    lines = []
    for number, run in enumerate(runs):
        items = run.items.get(benchmark, ())
        answers = [item.answer for item in items if item.answer is not None]
        if not answers:
            continue
        cells = agreement(
            (item.answer, item.labels)
            for item in items
            if item.answer is not None and item.labels is not None
        )
        judged = sum(cells.values()) > 0
        beside = kappa(cells["both"], cells["phrase_only"], cells["judge_only"], cells["neither"])
        lines.append(
            Refusals(
                benchmark,
                run.label,
                number,
                rate(sum(map(is_keyword_refusal, answers)), len(answers)),
                cells if judged else None,
                beside if judged else None,
            )
        )
    return lines
