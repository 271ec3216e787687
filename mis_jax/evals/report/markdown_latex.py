"""The report for repositories and papers: Markdown and LaTeX."""

from collections.abc import Sequence
from typing import Any

from mis_jax.evals.report.breakdown import FEW, shown_parts
from mis_jax.evals.report.compare import Cell, Comparison, Row, part_notes
from mis_jax.evals.report.formatting import (
    MINI_BANNER,
    change_interval,
    headline,
    interval,
    kappa_text,
    limits,
    metric_title,
    p_value,
    percent,
    points,
)
from mis_jax.evals.report.published_results import MODELS, PUBLISHED, SOURCE
from mis_jax.evals.run_dir import condition_notes
from mis_jax.evals.types import COUNT_STATES

_LEGEND = (
    "Brackets hold Wilson 95 % intervals, then judged answers that count over all judged. "
    "The paired p is McNemar's exact test over the samples that both runs share, and p (Holm) is "
    "it adjusted for all tests of the table in which any sample differs; the interval of a change "
    "is Newcombe's for paired rates."
)
_GROUPS = (
    " Where samples are linked, 'by groups' is the percentile interval of 10,000 cluster bootstrap "
    "draws of whole groups."
)


def _markdown_text(text: str) -> str:
    for sign in ("\\", "|", "_", "*", "<", "`"):
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", " ")


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, *lines]
    texts = ["| " + " | ".join(map(_markdown_text, row)) + " |" for row in rows]
    texts.insert(1, "| " + " | ".join(["---"] * len(head)) + " |")
    return "\n".join(texts)


def _section(
    title: str, head: Sequence[str], lines: Sequence[Sequence[str]], note: str = ""
) -> list[str]:
    """A titled table, or nothing where it has no lines."""
    return [f"## {title}", *([note] if note else []), _table(head, lines)] if lines else []


def _cell_text(cell: Cell | None) -> str:
    if cell is None:
        return "not run"
    if cell.value is None:
        return "nothing judged"
    text = f"{percent(cell.value)} [{interval(cell)}] {cell.k}/{cell.n}"
    if cell.part:
        text += f"; {cell.part[0]} of {cell.part[1]} samples asked"
    if cell.by_groups:
        text += f"; by groups {limits(*cell.by_groups)}"
    if cell.bounds:
        text += f"; {cell.n} of {cell.owed} judged, worst cases {limits(*cell.bounds)}"
    return text


def _change_text(row: Row) -> str:
    cell = row.cells[1]
    change = points(row)
    between = change_interval(cell) if cell else None
    return f"{change} ({between})" if change and between else change or "–"


def _adjusted_text(row: Row) -> str:
    cell = row.cells[1] if len(row.cells) > 1 else None
    return "–" if cell is None or cell.adjusted_p is None else p_value(cell.adjusted_p)


def _mean_text(cell: dict[str, Any] | None) -> str:
    if cell is None or cell["value"] is None:
        return "–"
    return f"{percent(cell['value'])} [{limits(cell['low'], cell['high'])}]"


def _count_text(cell: dict[str, Any] | None) -> str:
    if cell is None or cell["value"] is None:
        return "–"
    few = f" (n < {FEW})" if cell["n"] < FEW else ""
    return f"{percent(cell['value'])} {cell['k']}/{cell['n']}{few}"


def _test_text(row: Row) -> str:
    cell = row.cells[1] if len(row.cells) > 1 else None
    return p_value(cell.test.p_value) if cell and cell.test else "–"


def _columns(names: Sequence[str], texts: Sequence[str], compared: Sequence[str]) -> list[str]:
    """The columns of the main table: names, the first two runs, their comparison, the controls."""
    return [*names, *texts[:2], *(compared if len(texts) > 1 else ()), *texts[2:]]


def as_markdown(comparison: Comparison, title: str) -> str:
    """The report's figures for a repository or an issue."""
    labels = [run.label for run in comparison.runs]
    head = _columns(["benchmark", "metric"], labels, ["change", "paired p", "p (Holm)"])
    lines = [
        _columns(
            [row.benchmark, metric_title(row.metric)],
            [_cell_text(cell) for cell in row.cells],
            [_change_text(row), _test_text(row), _adjusted_text(row)] if len(labels) > 1 else [],
        )
        for row in comparison.rows
    ]
    lines += [
        _columns([mean.benchmark, mean.title], list(map(_mean_text, mean.cells)), ["–"] * 3)
        for mean in comparison.means
    ]
    counts = [
        [run.label, name, str(entry["n"]), *(str(entry["counts"][s]) for s in COUNT_STATES)]
        for run in comparison.runs
        for name, entry in run.results.items()
    ]
    parts = [
        f"# {_markdown_text(title)}",
        f"**{_markdown_text(headline(comparison))}**",
        *([f"> {MINI_BANNER}"] if comparison.only_mini else []),
        _table(head, lines),
        _LEGEND + (_GROUPS if comparison.has_groups else ""),
        *_published(comparison),
        *_differences(comparison),
        "## Samples and verdicts",
        _table(["run", "benchmark", "n", *COUNT_STATES], counts),
        *_categories(comparison),
        *_refusals(comparison),
        *_corrected(comparison),
        *_rechecks(comparison),
    ]
    if comparison.notes:
        parts += ["## Notes", "\n".join(f"- {_markdown_text(note)}" for note in comparison.notes)]
    return "\n\n".join(parts) + "\n"


def _published(comparison: Comparison) -> list[str]:
    lines = [
        [
            row.benchmark,
            metric_title(row.metric),
            f"{result.base:.2f}",
            f"{result.tuned:.2f}",
            str(result.n),
            result.remark,
        ]
        for row in comparison.rows
        if (result := PUBLISHED.get((row.benchmark, row.metric)))
    ]
    return _section(
        "Reference: the paper's own figures",
        ["benchmark", "metric", *MODELS, "n", "remark"],
        lines,
        f"As printed in {SOURCE}, in per cent; not computed here, and with the paper's judges.",
    )


def _differences(comparison: Comparison) -> list[str]:
    lines = [
        [benchmark, metric_title(metric), text]
        for (benchmark, metric), text in comparison.differences.items()
    ]
    return _section(
        "Where a row is not counted as its authors count it", ["benchmark", "metric", "how"], lines
    )


def _categories(comparison: Comparison) -> list[str]:
    lines = [
        [part.benchmark, metric_title(part.metric), part.fact, part.name]
        + [_count_text(cell) for cell in part.cells]
        for part in shown_parts(comparison.parts)
    ]
    head = ["benchmark", "metric", "by", "category", *(run.label for run in comparison.runs)]
    return _section("By category", head, lines)


def _refusals(comparison: Comparison) -> list[str]:
    lines = []
    for line in comparison.refusals:
        table = map(str, line.cells.values()) if line.cells else ["–"] * 4
        kappa = line.agreement and line.agreement.kappa
        value = "–" if kappa is None else f"{kappa:.2f}"
        lines.append([line.benchmark, line.label, _count_text(line.rate), *table, value])
    head = ["benchmark", "run", "refusal phrase", "both", "phrase only", "judge only", "neither"]
    return _section(
        "Refusal phrases beside the judge",
        [*head, "kappa"],
        lines,
        "A phrase is no verdict; kappa is Cohen's, where the judge says whether the model refused.",
    )


def _corrected(comparison: Comparison) -> list[str]:
    lines = [
        [
            entry.benchmark,
            run.label,
            f"{entry.gold.true_positives}/{entry.gold.positives}",
            f"{entry.gold.true_negatives}/{entry.gold.negatives}",
            f"{run.k}/{run.n}",
            _mean_text({"value": run.value, "low": run.low, "high": run.high}),
        ]
        for entry in comparison.corrections
        for run in entry.runs
    ]
    return _section(
        "Attack success corrected for the judge's errors",
        ["benchmark", "run", "sensitivity", "specificity", "as judged", "corrected"],
        lines,
        "Rogan and Gladen's estimate with Lang and Reiczigel's 95 % interval, from gold labels.",
    )


def _rechecks(comparison: Comparison) -> list[str]:
    lines = []
    for line in comparison.rechecks:
        agreed = f"{line.agreed['k']}/{line.agreed['n']}"
        agreed += f" [{limits(line.agreed['low'], line.agreed['high'])}]"
        table = map(str, line.cells.values())
        names = [line.benchmark, line.label, metric_title(line.metric)]
        lines.append([*names, agreed, *table, kappa_text(line.kappa), str(line.lost)])
    head = ["benchmark", "run", "metric", "alike", "both", "first only", "second only", "neither"]
    return _section(
        "The judge beside itself",
        [*head, "kappa", "without labels"],
        lines,
        "Answers that the judge was asked about twice; the second verdict is in no rate.",
    )


_TEX = {
    "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "–": "--", "−": "$-$", "<": "$<$", ">": "$>$", "\u00a0": "~", "\n": " ",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in text)


def _tex_rate(value: float | None, low: float, high: float) -> str:
    if value is None:
        return "--"
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _tex_cell(cell: Cell | None) -> str:
    return "--" if cell is None else _tex_rate(cell.value, cell.low, cell.high)


def _tex_mean(cell: dict[str, Any] | None) -> str:
    return "--" if cell is None else _tex_rate(cell["value"], cell["low"], cell["high"])


def _tex_p(text: str) -> str:
    return _tex(text.removeprefix("p\u00a0").removeprefix("=\u00a0"))


def _tex_line(texts: Sequence[str]) -> str:
    return " & ".join(texts) + r" \\"


def _tex_reference(row: Row, columns: int) -> list[str]:
    result = PUBLISHED.get((row.benchmark, row.metric))
    if result is None:
        return []
    text = f"{MODELS[0]} {result.base:.2f}, {MODELS[1]} {result.tuned:.2f}, n = {result.n}"
    return [rf" & \multicolumn{{{columns - 1}}}{{l}}{{\textit{{{_tex(text)}}}}} \\"]


def as_tex(comparison: Comparison, title: str) -> str:
    """A table for a paper; it needs the booktabs package."""
    labels = [_tex(run.label) for run in comparison.runs]
    head = _columns(["Benchmark", "Metric"], labels, ["Paired $p$", "$p$ (Holm)"])
    lines = []
    for benchmark in comparison.benchmarks:
        if lines:
            lines.append(r"\midrule")
        name = _tex(benchmark)
        for row in (row for row in comparison.rows if row.benchmark == benchmark):
            names = [name, _tex(metric_title(row.metric))]
            test = [_tex_p(_test_text(row)), _tex_p(_adjusted_text(row))]
            lines.append(_tex_line(_columns(names, list(map(_tex_cell, row.cells)), test)))
            lines += _tex_reference(row, len(head))
            name = ""
        lines += [
            _tex_line(
                _columns(["", _tex(mean.title)], list(map(_tex_mean, mean.cells)), ["--"] * 2)
            )
            for mean in comparison.means
            if mean.benchmark == benchmark
        ]
    caption = f"{_tex(title)}. Rates in per cent with Wilson 95\\,\\% intervals"
    caption += "; paired $p$ by McNemar's exact test, adjusted by Holm over the table" * (
        len(labels) > 1
    )
    caption += "."
    if any((row.benchmark, row.metric) in PUBLISHED for row in comparison.rows):
        caption += f" In italics: as printed in {SOURCE}, not computed here."
    for run in comparison.runs:
        notes = [note for name in comparison.benchmarks for note in part_notes(run, name)]
        notes += condition_notes(run.label, run.manifest)
        caption += "".join(f" {_tex(note)}" for note in notes)
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            *(
                f"% {benchmark}, {metric_title(metric)}, is not counted as its authors do: {how}"
                for (benchmark, metric), how in comparison.differences.items()
            ),
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{ll{'r' * (len(head) - 2)}}}",
            r"\toprule",
            _tex_line(head),
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )
