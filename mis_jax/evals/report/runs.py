"""A run as a report reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mis_jax.evals.manifest import read_manifest
from mis_jax.evals.scoring import count_items, run_items
from mis_jax.evals.types import Item


@dataclass(frozen=True)
class Run:
    """One evaluation run under the label a reader knows it by."""

    label: str
    manifest: dict[str, Any]
    items: dict[str, list[Item]]
    results: dict[str, Any]

    def judge(self, benchmark: str) -> str | None:
        """The id of the judge whose verdicts count."""
        return self.manifest["benchmarks"][benchmark].get("judge")


def read_run(label: str, run_dir: Path) -> Run:
    """A run as its logs stand now, so that a report never shows counts of an earlier day."""
    manifest = read_manifest(run_dir)
    items = run_items(run_dir)
    results = {
        name: count_items(name, manifest["benchmarks"][name]["protocol"], found)
        for name, found in items.items()
    }
    return Run(label, manifest, items, results)


def groups_of(items: list[Item]) -> dict[str, str]:
    """``{sample id: group}`` of the samples that belong to one."""
    return {item.id: str(item.facts["group"]) for item in items if "group" in item.facts}
