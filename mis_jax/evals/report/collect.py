"""Gather what a report shows: comparable rows of metrics, paired tests, and what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mis_jax.evals.benchmarks import get_benchmark, in_order, size_note
from mis_jax.evals.manifest import read_manifest
from mis_jax.evals.metrics import applies
from mis_jax.evals.stats import PairedTest, mcnemar, worst_case
from mis_jax.evals.summary import Item, count_items, metric_votes, run_items

FEW_GROUPS = 0.5
"""Below this share of distinct groups per sample, a report says that the samples are not
independent."""


@dataclass(frozen=True)
class Run:
    """One evaluation run under the label a reader knows it by."""

    label: str
    manifest: dict[str, Any]
    items: dict[str, list[Item]]
    results: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One metric of one run, with its test against the first run and its worst-case bounds."""

    k: int
    n: int
    value: float | None
    low: float
    high: float
    total: int
    bounds: tuple[float, float] | None
    """Where the rate could lie had every item without a verdict been judged; None if none is."""
    test: PairedTest | None


@dataclass(frozen=True)
class Row:
    """One metric of one benchmark over all runs; a run that lacks the benchmark has None."""

    benchmark: str
    metric: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class Comparison:
    """Everything a report is written from, besides pictures and curves."""

    runs: list[Run]
    rows: list[Row]
    notes: list[str]

    @property
    def benchmarks(self) -> list[str]:
        """The benchmarks shown, in their registered order."""
        return list(dict.fromkeys(row.benchmark for row in self.rows))

    @property
    def only_mini(self) -> bool:
        """Whether nothing but the drawn mini world was evaluated."""
        return bool(self.rows) and all(name.startswith("mini_") for name in self.benchmarks)

    def row(self, benchmark: str, metric: str) -> Row | None:
        """The row of a metric, if any run has it."""
        for row in self.rows:
            if (row.benchmark, row.metric) == (benchmark, metric):
                return row
        return None


def read_run(label: str, run_dir: Path) -> Run:
    """A run as its logs stand now, so that a report never shows counts of an earlier day."""
    manifest = read_manifest(run_dir)
    items = run_items(run_dir)
    results = {
        name: count_items(name, manifest["benchmarks"][name]["protocol"], found)
        for name, found in items.items()
    }
    return Run(label, manifest, items, results)


def compare(runs: Sequence[tuple[str, Path]], notes: Sequence[str] = ()) -> Comparison:
    """Read the runs and put their metrics side by side; the first run is the reference."""
    if not runs:
        raise ValueError("a report needs at least one run folder; give RUN to `mis-jax report`")
    labels = [label for label, _ in runs]
    if len(set(labels)) != len(labels):
        raise ValueError(f"run labels repeat ({', '.join(labels)}); give each run its own")
    read = [read_run(label, path) for label, path in runs]
    rows = [
        Row(name, metric, [_cell(run, read[0], name, metric) for run in read])
        for name in in_order({name for run in read for name in run.results})
        for metric in get_benchmark(name).metrics
    ]
    return Comparison(read, rows, [*notes, *_own_notes(read)])


def _cell(run: Run, reference: Run, name: str, metric: str) -> Cell | None:
    if name not in run.results:
        return None
    entry = run.results[name]
    counted = entry["metrics"][metric]
    benchmark = get_benchmark(name)
    own = [item for item in run.items[name] if applies(benchmark, metric, item.facts)]
    judged = sum(item.state == "ok" for item in own)
    bounds = None
    # Labels that say nothing about the metric leave no denominator for what was never labelled.
    if judged < len(own) and counted["n"] == judged:
        bounds = worst_case(counted["k"], counted["n"], len(own))
    test = None
    if run is not reference and name in reference.results:
        test = _paired(reference.items[name], run.items[name], metric)
    return Cell(**counted, total=entry["n"], bounds=bounds, test=test)


def _paired(first: list[Item], second: list[Item], metric: str) -> PairedTest | None:
    """McNemar's test over the samples that are the same by content, not just by id."""
    known = {item.id: item.hash for item in first}
    same = [item for item in second if known.get(item.id) == item.hash]
    test = mcnemar(metric_votes(first, metric), metric_votes(same, metric))
    return test if test.pairs else None


def _own_notes(runs: list[Run]) -> list[str]:
    """What a reader must know before comparing the numbers."""
    notes: list[str] = []
    repeating: list[str] = []
    names = in_order({name for run in runs for name in run.results})
    for name in names:
        having = [run for run in runs if name in run.results]
        entries = [run.manifest["benchmarks"][name] for run in having]
        for size in sorted({run.results[name]["n"] for run in having}):
            note = size_note(name, size)
            if note:
                notes.append(note)
        n, groups = entries[0]["n"], entries[0].get("groups") or entries[0]["n"]
        if groups < FEW_GROUPS * n:
            repeating.append(f"{n} samples of {name} over {groups} groups")
        for field, remedy in (
            ("protocol", "their figures are not comparable"),
            ("judge", "their figures are not comparable"),
        ):
            values = list(dict.fromkeys(str(entry.get(field)) for entry in entries))
            if len(values) > 1:
                notes.append(f"{name}: the runs differ in {field} ({', '.join(values)}); {remedy}.")
        for run in having[1:]:
            known = {item.id: item.hash for item in having[0].items[name]}
            other = sum(known.get(item.id) != item.hash for item in run.items[name])
            if other:
                notes.append(
                    f"{name}: {other} of {run.results[name]['n']} samples of {run.label} are not "
                    f"the samples of {having[0].label} (prompt, pictures or protocol); "
                    "they are left out of the paired test."
                )
    if repeating:
        notes.append(
            f"Samples come in groups that share their subject (in the mini world, one pair of "
            f"objects): {', '.join(repeating)}. Intervals and tests treat samples as independent, "
            "so they speak of new pictures and wordings of these subjects, not of new subjects."
        )
    for run in runs:
        if run.manifest.get("resumed"):
            notes.append(f"{run.label} was resumed under other versions than it was begun with.")
    return notes
