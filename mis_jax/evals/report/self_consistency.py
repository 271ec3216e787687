"""How far a judge agrees with itself, for each run that has second verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mis_jax.evals.scoring import Run


@dataclass(frozen=True)
class Rechecked:
    """One metric under both verdicts of a judge; see ``evals/self_consistency.py`` for the numbers.

    ``lost`` second verdicts have no labels and are in none of the counts.
    """

    benchmark: str
    label: str
    number: int
    judge: str | None
    metric: str
    agreed: dict[str, Any]
    cells: dict[str, int]
    kappa: dict[str, float | None]
    lost: int


def rechecks(runs: Sequence[Run], benchmark: str) -> list[Rechecked]:
    """One line for each run and metric."""
    lines = []
    for number, run in enumerate(runs):
        found = run.results.get(benchmark, {}).get("recheck")
        if found is None:
            continue
        for metric, one in found["metrics"].items():
            if not one["agreed"]["n"]:
                continue  # labels that say nothing of it
            cells = {k: one[k] for k in ("both", "only_first", "only_second", "neither")}
            lost = found["n"] - found["counts"]["ok"]
            lines.append(
                Rechecked(
                    benchmark,
                    run.label,
                    number,
                    run.judge(benchmark),
                    metric,
                    one["agreed"],
                    cells,
                    one["kappa"],
                    lost,
                )
            )
    return lines
