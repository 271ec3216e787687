"""The report for other programs: JSON and CSV, with every count and no text of a model or a set."""

import csv
import io
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from mis_jax.evals.report.compare import Comparison
from mis_jax.evals.report.formatting import headline
from mis_jax.evals.report.judge_agreement import GOLD_METRIC, PHRASE_METRIC
from mis_jax.evals.report.published_results import MODELS, PUBLISHED, SOURCE
from mis_jax.evals.scoring import Run
from mis_jax.evals.types import COUNT_STATES

CSV_FIELDS = (
    "run", "benchmark", "protocol", "judge", "metric", "k", "n", "value", "low", "high",
    "p_vs_first", "pairs", "total", *(state for state in COUNT_STATES),
    "part_of", "part", "owed", "worst_low", "worst_high", "groups_low", "groups_high",
    "p_holm", "difference", "difference_low", "difference_high", "set_size",
)  # fmt: skip
"""`part_of` is empty for a rate over all samples, `category`, `sub_category` or `subset`
for a rate over the samples of one (its name in `part`), `mean` for a mean of rates or a rate
over pairs, `phrases` for refusal phrases, `corrected` for a rate without its judge's errors,
`recheck` for how often two verdicts of one judge count alike, and `published` for a figure that
the paper printed. `set_size` stands where a part of the set was asked."""


def as_json(comparison: Comparison, title: str) -> dict[str, Any]:
    """Everything countable about the comparison; no text of a model or of a set."""
    cells = [
        (row, run, cell)
        for row in comparison.rows
        for run, cell in zip(comparison.runs, row.cells, strict=True)
        if cell
    ]
    labels = [run.label for run in comparison.runs]
    return {
        "title": title,
        "headline": headline(comparison),
        "runs": [
            {"label": run.label, "manifest": run.manifest, "results": run.results}
            for run in comparison.runs
        ],
        "tests": [
            {
                "benchmark": row.benchmark,
                "metric": row.metric,
                "first": labels[0],
                "second": run.label,
                "test": "mcnemar_exact",
                **asdict(cell.test),
                "p_holm": cell.adjusted_p,
                "by_groups": cell.change_by_groups,
            }
            for row, run, cell in cells
            if cell.test
        ],
        "unjudged": [
            {
                "benchmark": row.benchmark,
                "metric": row.metric,
                "run": run.label,
                "judged": cell.n,
                "owed": cell.owed,
                "worst_cases": cell.bounds,
            }
            for row, run, cell in cells
            if cell.bounds
        ],
        "intervals_by_groups": [
            {
                "benchmark": row.benchmark,
                "metric": row.metric,
                "run": run.label,
                "low": cell.by_groups[0],
                "high": cell.by_groups[1],
            }
            for row, run, cell in cells
            if cell.by_groups
        ],
        "means": [_by_run(asdict(mean), labels) for mean in comparison.means],
        "categories": [_by_run(asdict(part), labels) for part in comparison.parts],
        "refusal_phrases": [
            {key: value for key, value in asdict(line).items() if key != "number"}
            for line in comparison.refusals
        ],
        "judge_beside_itself": [
            {key: value for key, value in asdict(line).items() if key != "number"}
            for line in comparison.rechecks
        ],
        "corrected_for_the_judge": [asdict(entry) for entry in comparison.corrections],
        "published": {"source": SOURCE, "figures": list(_published(comparison))},
        "differences": [
            {"benchmark": benchmark, "metric": metric, "how": how}
            for (benchmark, metric), how in comparison.differences.items()
        ],
        "notes": comparison.notes,
    }


def _by_run(entry: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    return entry | {"cells": dict(zip(labels, entry["cells"], strict=True))}


def _published(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for row in comparison.rows:
        result = PUBLISHED.get((row.benchmark, row.metric))
        for model, value in zip(MODELS, result[1:3] if result else (), strict=False):
            yield {
                "benchmark": row.benchmark,
                "metric": row.metric,
                "model": model,
                "percent": value,
                "n": result.n if result else None,
                "remark": result.remark if result else "",
            }


def as_csv(comparison: Comparison) -> str:
    """One line for each run and metric, counts beside the rates; then means and categories."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_metric_lines(comparison))
    for mean in comparison.means:
        for run, cell in zip(comparison.runs, mean.cells, strict=True):
            if cell is not None:
                counts = {k: cell[k] for k in ("k", "n", "value", "low", "high") if k in cell}
                part = {"part_of": "mean", "part": mean.title}
                writer.writerow(_names(run, mean.benchmark, mean.name) | counts | part)
    for part in comparison.parts:
        for run, cell in zip(comparison.runs, part.cells, strict=True):
            if cell is not None and cell["n"]:
                place = {"part_of": part.fact, "part": part.name}
                writer.writerow(_names(run, part.benchmark, part.metric) | cell | place)
    runs = {run.label: run for run in comparison.runs}
    for line in comparison.refusals:
        names = _names(runs[line.label], line.benchmark, PHRASE_METRIC)
        writer.writerow(names | {"judge": None, "part_of": "phrases"} | line.rate)
    for entry in comparison.corrections:
        for run in entry.runs:
            limits = {"value": run.value, "low": run.low, "high": run.high}
            names = _names(runs[run.label], entry.benchmark, GOLD_METRIC)
            writer.writerow(names | {"n": run.n, "part_of": "corrected"} | limits)
    for line in comparison.rechecks:
        names = _names(runs[line.label], line.benchmark, line.metric)
        writer.writerow(names | {"part_of": "recheck"} | line.agreed)
    for figure in _published(comparison):
        writer.writerow(
            {
                "run": f"published: {figure['model']}",
                "benchmark": figure["benchmark"],
                "protocol": SOURCE,
                "metric": figure["metric"],
                "n": figure["n"],
                "value": round(figure["percent"] / 100, 6),
                "part_of": "published",
            }
        )
    return stream.getvalue()


def _names(run: Run, benchmark: str, metric: str) -> dict[str, Any]:
    return {
        "run": run.label,
        "benchmark": benchmark,
        "protocol": run.results[benchmark]["protocol"],
        "judge": run.judge(benchmark),
        "metric": metric,
    }


def _metric_lines(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for row in comparison.rows:
        for run, cell in zip(comparison.runs, row.cells, strict=True):
            if cell is None:
                continue
            entry = run.results[row.benchmark]
            line = _names(run, row.benchmark, row.metric) | entry["metrics"][row.metric]
            line |= {"total": entry["n"], "owed": cell.owed, **entry["counts"]}
            line |= {"set_size": entry.get("of")}
            if cell.bounds:
                line |= {"worst_low": cell.bounds[0], "worst_high": cell.bounds[1]}
            if cell.by_groups:
                line |= {"groups_low": cell.by_groups[0], "groups_high": cell.by_groups[1]}
            if cell.test:
                line |= {
                    "p_vs_first": cell.test.p_value,
                    "pairs": cell.test.pairs,
                    "p_holm": cell.adjusted_p,
                    "difference": cell.test.difference,
                    "difference_low": cell.test.low,
                    "difference_high": cell.test.high,
                }
            yield line
