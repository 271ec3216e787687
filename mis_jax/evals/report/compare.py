"""Gather what a report shows: comparable rows of metrics, paired tests, and what is missing."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mis_jax.evals.benchmarks import get_benchmark, in_order, size_note
from mis_jax.evals.outcomes import METRICS, applies
from mis_jax.evals.report.breakdown import Mean, Part, by_category, means
from mis_jax.evals.report.judge_agreement import (
    Correction,
    Rechecked,
    Refusals,
    corrections,
    read_gold,
    rechecks,
    refusals,
)
from mis_jax.evals.run_dir import condition_notes
from mis_jax.evals.scoring import Run, groups_of, metric_votes, read_run
from mis_jax.evals.stats import (
    PairedTest,
    cluster_difference,
    cluster_rate,
    holm,
    linked,
    mcnemar,
    worst_case,
)
from mis_jax.evals.types import Item


@dataclass(frozen=True)
class Cell:
    """One metric of one run, with its test against the first run and its worst-case bounds."""

    k: int
    n: int
    value: float | None
    low: float
    high: float
    owed: int
    """How many samples the metric counts for, judged or not."""
    bounds: tuple[float, float] | None
    """Where the rate could lie had every item without a verdict been judged; None if none is."""
    by_groups: tuple[float, float] | None
    """The interval with whole groups drawn; None where no two samples are linked."""
    test: PairedTest | None
    change_by_groups: tuple[float, float] | None
    part: tuple[int, int] | None = None
    """How many samples of how many in the set were asked; None for all."""
    adjusted_p: float | None = None
    """The test's p after Holm, over all tests of this run against the first."""


@dataclass(frozen=True)
class Row:
    """One metric of one benchmark over all runs; a run that lacks the benchmark has None."""

    benchmark: str
    metric: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class Comparison:
    """Everything a report is written from, besides images and curves."""

    runs: list[Run]
    rows: list[Row]
    notes: list[str]
    means: list[Mean] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    refusals: list[Refusals] = field(default_factory=list)
    corrections: list[Correction] = field(default_factory=list)
    rechecks: list[Rechecked] = field(default_factory=list)

    @property
    def benchmarks(self) -> list[str]:
        """The benchmarks shown, in their registered order."""
        return list(dict.fromkeys(row.benchmark for row in self.rows))

    @property
    def only_mini(self) -> bool:
        """Whether nothing but the drawn mini world was evaluated."""
        return bool(self.rows) and all(name.startswith("mini_") for name in self.benchmarks)

    @property
    def has_groups(self) -> bool:
        """Whether any interval draws whole groups."""
        return any(cell and cell.by_groups for row in self.rows for cell in row.cells)

    @property
    def differences(self) -> dict[tuple[str, str], str]:
        """Rows that their authors count in another way, and how."""
        known = {(row.benchmark, row.metric): get_benchmark(row.benchmark) for row in self.rows}
        return {
            (name, metric): benchmark.differences[metric]
            for (name, metric), benchmark in known.items()
            if metric in benchmark.differences
        }

    def row(self, benchmark: str, metric: str) -> Row | None:
        """The row of a metric, if any run has it."""
        for row in self.rows:
            if (row.benchmark, row.metric) == (benchmark, metric):
                return row
        return None


def compare(
    runs: Sequence[tuple[str, Path]], notes: Sequence[str] = (), gold: Path | None = None
) -> Comparison:
    """Read the runs and put their metrics side by side; the first run is the reference."""
    if not runs:
        raise ValueError("a report needs at least one run folder; give RUN to `mis-jax report`")
    labels = [label for label, _ in runs]
    if len(set(labels)) != len(labels):
        raise ValueError(f"run labels repeat ({', '.join(labels)}); give each run its own")
    read = [read_run(label, path) for label, path in runs]
    names = in_order({name for run in read for name in run.results})
    rows = [
        Row(name, metric, [_cell(run, read[0], name, metric) for run in read])
        for name in names
        for metric in get_benchmark(name).metrics
    ]
    rows = _adjusted(rows, len(read))
    parts = {name: by_category(read, name) for name in names}
    return Comparison(
        read,
        rows,
        [*notes, *_own_notes(read, rows)],
        [mean for name in names for mean in means(read, parts[name], name)],
        [part for name in names for part in parts[name]],
        [line for name in names for line in refusals(read, name)],
        corrections(read, read_gold(gold, read)) if gold else [],
        [line for name in names for line in rechecks(read, name)],
    )


def _cell(run: Run, reference: Run, name: str, metric: str) -> Cell | None:
    if name not in run.results:
        return None
    counted = run.results[name]["metrics"][metric]
    benchmark = get_benchmark(name)
    items = [item for item in run.items[name] if applies(benchmark, metric, item.facts)]
    votes, groups = metric_votes(items, metric), groups_of(items)
    bounds = None
    # Labels that say nothing about the metric leave no denominator for what was never labelled.
    silent = any(item.state == "ok" and item.id not in votes for item in items)
    if len(votes) < len(items) and not silent:
        bounds = worst_case(counted["k"], counted["n"], len(items))
    grouped = linked(votes, groups)
    test = change = None
    if run is not reference and name in reference.results:
        before, after = _shared_votes(reference.items[name], items, metric)
        test = mcnemar(before, after) if after else None
        change = cluster_difference(before, after, groups) if test and grouped else None
    return Cell(
        **counted,
        owed=len(items),
        bounds=bounds,
        by_groups=cluster_rate(votes, groups) if grouped else None,
        test=test,
        change_by_groups=change,
        part=(entry["n"], entry["of"]) if "of" in (entry := run.results[name]) else None,
    )


def _shared_votes(
    first: list[Item], second: list[Item], metric: str
) -> tuple[dict[str, bool], dict[str, bool]]:
    """The votes over the samples that are the same by content, not just by id."""
    hashes = {item.id: item.hash for item in first}
    same = [item for item in second if hashes.get(item.id) == item.hash]
    before, after = metric_votes(first, metric), metric_votes(same, metric)
    shared = before.keys() & after.keys()
    return (
        {key: before[key] for key in before if key in shared},
        {key: after[key] for key in after if key in shared},
    )


def _adjusted(rows: list[Row], runs: int) -> list[Row]:
    """The rows with Holm's p-values; the tests of one run against the first are one family.

    A test without a single differing sample is none of it: given how many samples differ, it
    could not have found anything (Tarone), and would only weaken the others.
    """
    cells = [list(row.cells) for row in rows]
    for place in range(runs):
        tested = [
            (row_cells, cell, cell.test.p_value)
            for row_cells in cells
            if (cell := row_cells[place]) is not None and cell.test and cell.test.differing
        ]
        p_values = holm([p_value for _, _, p_value in tested])
        for (row_cells, cell, _), p_value in zip(tested, p_values, strict=True):
            row_cells[place] = replace(cell, adjusted_p=p_value)
        for row_cells in cells:
            if (cell := row_cells[place]) is not None and cell.test and cell.adjusted_p is None:
                row_cells[place] = replace(cell, adjusted_p=1.0)
    return [replace(row, cells=row_cells) for row, row_cells in zip(rows, cells, strict=True)]


def _own_notes(runs: list[Run], rows: list[Row]) -> list[str]:
    """What a reader must know before comparing the numbers."""
    notes: list[str] = []
    names = in_order({name for run in runs for name in run.results})
    for name in names:
        having = [run for run in runs if name in run.results]
        entries = [run.manifest["benchmarks"][name] for run in having]
        results = [run.results[name] for run in having]
        for size in sorted({result.get("of", result["n"]) for result in results}):
            note = size_note(name, size)
            if note:
                notes.append(note)
        for run in having:
            notes += part_notes(run, name)
        for fact, remedy in (
            ("protocol", "their figures are not comparable"),
            ("judge", "their figures are not comparable"),
        ):
            values = list(dict.fromkeys(str(entry.get(fact)) for entry in entries))
            if len(values) > 1:
                notes.append(f"{name}: the runs differ in {fact} ({', '.join(values)}); {remedy}.")
        for metric in get_benchmark(name).over_pairs:
            unpaired = [r.label for r in having if metric not in r.results[name]["metrics"]]
            if unpaired:
                title = METRICS[metric].title.lower()
                notes.append(
                    f"{name}: the file that {', '.join(unpaired)} read does not say which "
                    f"questions are counterparts, so {title} is left out there."
                )
        for run in having:
            if empty := run.results[name].get("empty"):
                notes.append(
                    f"{name}: {empty} of {run.results[name]['n']} answers of {run.label} are empty."
                )
            if cached := run.results[name].get("cached"):
                judged = run.results[name]["counts"]["ok"]
                notes.append(
                    f"{name}: {cached} of {judged} verdicts on {run.label} come from a verdict "
                    "cache: an earlier run paid for them, on the same questions and answers."
                )
        for run in having[1:]:
            known = {item.id: item.hash for item in having[0].items[name]}
            other = sum(known.get(item.id) != item.hash for item in run.items[name])
            if other:
                notes.append(
                    f"{name}: {other} of {run.results[name]['n']} samples of {run.label} are not "
                    f"the samples of {having[0].label} (prompt, pictures or protocol); "
                    "they are left out of the paired test."
                )
    for run in runs:
        notes += condition_notes(run.label, run.manifest)
        if run.manifest.get("resumed"):
            notes.append(f"{run.label} was resumed under other versions than it was begun with.")
    return [*notes, *_group_notes(runs, rows)]


def part_notes(run: Run, name: str) -> list[str]:
    """That a run was asked a part of a benchmark; nothing for the whole."""
    result = run.results.get(name, {})
    if "of" not in result:
        return []
    return [f"{name}: {run.label} was asked {result['n']} of the set's {result['of']} samples."]


def _group_notes(runs: list[Run], rows: list[Row]) -> list[str]:
    """Which sets have samples that share their subject, and what that does to the intervals."""
    repeating = []
    grouped = [row.benchmark for row in rows if any(cell and cell.by_groups for cell in row.cells)]
    for name in dict.fromkeys(grouped):
        entry = next(run.manifest["benchmarks"][name] for run in runs if name in run.results)
        repeating.append(f"{entry['n']} samples of {name} over {entry['groups']} groups")
    if not repeating:
        return []
    return [
        f"Samples come in groups that share a picture, a request or a subject: "
        f"{', '.join(repeating)}. Wilson intervals and the paired test treat samples as "
        "independent, so they speak of more samples of the same groups; the interval by groups "
        "draws whole groups and speaks of new ones. With few groups it is still too narrow."
    ]
