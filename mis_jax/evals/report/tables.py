"""The report for other programs and for papers: JSON, CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mis_jax.evals.report.collect import Cell, Comparison, Row
from mis_jax.evals.report.words import (
    MINI_BANNER,
    headline,
    interval,
    metric_title,
    p_value,
    percent,
    points,
)
from mis_jax.evals.types import COUNT_STATES

CSV_FIELDS = (
    "run", "benchmark", "protocol", "judge", "metric", "k", "n", "value", "low", "high",
    "p_vs_first", "pairs", "total", *(state for state in COUNT_STATES),
)  # fmt: skip


def as_json(comparison: Comparison, title: str) -> dict[str, Any]:
    """Everything countable about the comparison; no text of a model or of a set."""
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
                "first": comparison.runs[0].label,
                "second": run.label,
                "test": "mcnemar_exact",
                **asdict(cell.test),
            }
            for row in comparison.rows
            for run, cell in zip(comparison.runs, row.cells, strict=True)
            if cell and cell.test
        ],
        "notes": comparison.notes,
    }


def as_csv(comparison: Comparison) -> str:
    """One line for each run and metric, counts beside the rates."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in comparison.rows:
        for run, cell in zip(comparison.runs, row.cells, strict=True):
            if cell is None:
                continue
            entry = run.results[row.benchmark]
            writer.writerow(
                {
                    "run": run.label,
                    "benchmark": row.benchmark,
                    "protocol": entry["protocol"],
                    "judge": run.manifest["benchmarks"][row.benchmark].get("judge"),
                    "metric": row.metric,
                    **entry["metrics"][row.metric],
                    "p_vs_first": cell.test.p_value if cell.test else None,
                    "pairs": cell.test.pairs if cell.test else None,
                    "total": cell.total,
                    **entry["counts"],
                }
            )
    return stream.getvalue()


_LEGEND = (
    "Brackets hold Wilson 95 % intervals, then judged answers that count over all judged. "
    "The paired p is McNemar's exact test over the samples that both runs share."
)


def _markdown_text(text: str) -> str:
    for sign in ("\\", "|", "_", "*", "<", "`"):
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", " ")


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell_text(cell: Cell | None) -> str:
    if cell is None:
        return "not run"
    if cell.value is None:
        return "nothing judged"
    return f"{percent(cell.value)} [{interval(cell)}] {cell.k}/{cell.n}"


def _order(comparison: Comparison) -> tuple[list[str], list[str], bool]:
    """Column labels: the first run, the second, the controls; and whether there is a pair."""
    labels = [run.label for run in comparison.runs]
    return labels[:2], labels[2:], len(labels) > 1


def _test_text(row: Row) -> str:
    cell = row.cells[1] if len(row.cells) > 1 else None
    return p_value(cell.test.p_value) if cell and cell.test else "–"


def as_markdown(comparison: Comparison, title: str) -> str:
    """The report's figures for a repository or an issue."""
    main, controls, paired = _order(comparison)
    head = ["benchmark", "metric", *main, *(["change", "paired p"] if paired else []), *controls]
    lines = []
    for row in comparison.rows:
        cells = [_cell_text(cell) for cell in row.cells]
        test = [points(row) or "–", _test_text(row)] if paired else []
        texts = [row.benchmark, metric_title(row.metric), *cells[:2], *test, *cells[2:]]
        lines.append([_markdown_text(text) for text in texts])
    counts = [
        [_markdown_text(text) for text in (run.label, name, str(entry["n"]))]
        + [str(entry["counts"][state]) for state in COUNT_STATES]
        for run in comparison.runs
        for name, entry in run.results.items()
    ]
    parts = [
        f"# {_markdown_text(title)}",
        f"**{_markdown_text(headline(comparison))}**",
        *([f"> {MINI_BANNER}"] if comparison.only_mini else []),
        _table([_markdown_text(text) for text in head], lines),
        _LEGEND,
        "## Samples and verdicts",
        _table(["run", "benchmark", "n", *COUNT_STATES], counts),
    ]
    if comparison.notes:
        parts += ["## Notes", "\n".join(f"- {_markdown_text(note)}" for note in comparison.notes)]
    return "\n\n".join(parts) + "\n"


_TEX = {
    "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "–": "--", "−": "$-$", "<": "$<$", ">": "$>$", "\u00a0": "~", "\n": " ",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in text)


def _tex_cell(cell: Cell | None) -> str:
    if cell is None or cell.value is None:
        return "--"
    return f"{100 * cell.value:.1f} [{100 * cell.low:.1f}, {100 * cell.high:.1f}]"


def as_tex(comparison: Comparison, title: str) -> str:
    """A table for a paper; it needs the booktabs package."""
    main, controls, paired = _order(comparison)
    head = ["Benchmark", "Metric", *main, *(["Paired $p$"] if paired else []), *controls]
    lines = []
    last = None
    for row in comparison.rows:
        cells = [_tex_cell(cell) for cell in row.cells]
        test = [_tex(_test_text(row).removeprefix("p\u00a0").removeprefix("=\u00a0"))]
        name = "" if row.benchmark == last else _tex(row.benchmark)
        if last is not None and name:
            lines.append(r"\midrule")
        last = row.benchmark
        texts = [name, _tex(metric_title(row.metric)), *cells[:2], *(test if paired else [])]
        lines.append(" & ".join([*texts, *cells[2:]]) + r" \\")
    labels = [text if text == "Paired $p$" else _tex(text) for text in head]
    caption = f"{_tex(title)}. Rates in per cent with Wilson 95\\,\\% intervals"
    caption += "; paired $p$ by McNemar's exact test." if paired else "."
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{ll{'r' * (len(head) - 2)}}}",
            r"\toprule",
            " & ".join(labels) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )
