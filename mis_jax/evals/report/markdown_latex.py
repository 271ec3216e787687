"""The report for repositories and papers: Markdown and LaTeX."""

from collections.abc import Sequence
from typing import Any

from mis_jax.evals.report.breakdown import FEW, Mean, shown_metrics
from mis_jax.evals.report.compare import Cell, Comparison, Row
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
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell_text(cell: Cell | None) -> str:
    if cell is None:
        return "not run"
    if cell.value is None:
        return "nothing judged"
    text = f"{percent(cell.value)} [{interval(cell)}] {cell.k}/{cell.n}"
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


def _order(comparison: Comparison) -> tuple[list[str], list[str], bool]:
    """Column labels: the first run, the second, the controls; and whether there is a pair."""
    labels = [run.label for run in comparison.runs]
    return labels[:2], labels[2:], len(labels) > 1


def _test_text(row: Row) -> str:
    cell = row.cells[1] if len(row.cells) > 1 else None
    return p_value(cell.test.p_value) if cell and cell.test else "–"


def as_markdown(comparison: Comparison, title: str) -> str:
    """The report's figures for a repository or an issue."""
    main, others, paired = _order(comparison)
    compared = ["change", "paired p", "p (Holm)"] if paired else []
    head = ["benchmark", "metric", *main, *compared, *others]
    lines = []
    for row in comparison.rows:
        cells = [_cell_text(cell) for cell in row.cells]
        test = [_change_text(row), _test_text(row), _adjusted_text(row)] if paired else []
        texts = [row.benchmark, metric_title(row.metric), *cells[:2], *test, *cells[2:]]
        lines.append([_markdown_text(text) for text in texts])
    for mean in comparison.means:
        cells = [_mean_text(cell) for cell in mean.cells]
        gap = ["–"] * len(compared)
        texts = [mean.benchmark, mean.title, *cells[:2], *gap, *cells[2:]]
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
        _LEGEND + (_GROUPS if comparison.has_groups else ""),
        *_published(comparison),
        "## Samples and verdicts",
        _table(["run", "benchmark", "n", *COUNT_STATES], counts),
    ]
    parts += [*_categories(comparison), *_refusals(comparison), *_corrected(comparison)]
    parts += _rechecks(comparison)
    if comparison.notes:
        parts += ["## Notes", "\n".join(f"- {_markdown_text(note)}" for note in comparison.notes)]
    return "\n\n".join(parts) + "\n"


def _published(comparison: Comparison) -> list[str]:
    rows = [(row, PUBLISHED.get((row.benchmark, row.metric))) for row in comparison.rows]
    lines = [
        (
            row.benchmark,
            metric_title(row.metric),
            f"{known.base:.2f}",
            f"{known.tuned:.2f}",
            str(known.n),
            known.remark,
        )
        for row, known in rows
        if known
    ]
    if not lines:
        return []
    lines = [[_markdown_text(text) for text in line] for line in lines]
    return [
        "## Reference: the paper's own figures",
        f"As printed in {SOURCE}, in per cent; not computed here, and with the paper's judges.",
        _table(["benchmark", "metric", *MODELS, "n", "remark"], lines),
    ]


def _categories(comparison: Comparison) -> list[str]:
    lines = [
        [part.benchmark, metric_title(part.metric), part.fact, part.name]
        + [_count_text(cell) for cell in part.cells]
        for part in comparison.parts
        if part.metric in shown_metrics(part.benchmark)
    ]
    if not lines:
        return []
    head = ["benchmark", "metric", "by", "category", *(run.label for run in comparison.runs)]
    return ["## By category", _table(*_escaped(head, lines))]


def _escaped(
    head: Sequence[str], lines: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    return (
        [_markdown_text(text) for text in head],
        [[_markdown_text(text) for text in line] for line in lines],
    )


def _refusals(comparison: Comparison) -> list[str]:
    lines = []
    for line in comparison.refusals:
        cells, beside = line.cells, line.agreement
        table = [str(count) for count in cells.values()] if cells else ["–"] * 4
        value = "–" if beside is None or beside.kappa is None else f"{beside.kappa:.2f}"
        lines.append([line.benchmark, line.label, _count_text(line.rate), *table, value])
    if not lines:
        return []
    head = ["benchmark", "run", "refusal phrase", "both", "phrase only", "judge only", "neither"]
    return [
        "## Refusal phrases beside the judge",
        "A phrase is no verdict; kappa is Cohen's, where the judge says whether the model refused.",
        _table(*_escaped([*head, "kappa"], lines)),
    ]


def _corrected(comparison: Comparison) -> list[str]:
    lines = []
    for entry in comparison.corrections:
        for run in entry.runs:
            value = {"value": run.value, "low": run.low, "high": run.high}
            lines.append(
                [
                    entry.benchmark,
                    run.label,
                    f"{entry.gold.true_positives}/{entry.gold.positives}",
                    f"{entry.gold.true_negatives}/{entry.gold.negatives}",
                    f"{run.k}/{run.n}",
                    _mean_text(value),
                ]
            )
    if not lines:
        return []
    head = ["benchmark", "run", "sensitivity", "specificity", "as judged", "corrected"]
    return [
        "## Attack success corrected for the judge's errors",
        "Rogan and Gladen's estimate with Lang and Reiczigel's 95 % interval, from gold labels.",
        _table(*_escaped(head, lines)),
    ]


def _rechecks(comparison: Comparison) -> list[str]:
    lines = []
    for line in comparison.rechecks:
        table = [str(count) for count in line.cells.values()]
        agreed = f"{line.agreed['k']}/{line.agreed['n']}"
        agreed += f" [{limits(line.agreed['low'], line.agreed['high'])}]"
        names = [line.benchmark, line.label, metric_title(line.metric)]
        lines.append([*names, agreed, *table, kappa_text(line.kappa), str(line.lost)])
    if not lines:
        return []
    head = ["benchmark", "run", "metric", "alike", "both", "first only", "second only", "neither"]
    return [
        "## The judge beside itself",
        "Answers that the judge was asked about twice; the second verdict is in no rate.",
        _table(*_escaped([*head, "kappa", "without labels"], lines)),
    ]


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


def _tex_p(text: str) -> str:
    return _tex(text.removeprefix("p\u00a0").removeprefix("=\u00a0"))


def _tex_reference(row: Row, columns: int) -> list[str]:
    known = PUBLISHED.get((row.benchmark, row.metric))
    if known is None:
        return []
    text = f"{MODELS[0]} {known.base:.2f}, {MODELS[1]} {known.tuned:.2f}, n = {known.n}"
    return [rf" & \multicolumn{{{columns - 1}}}{{l}}{{\textit{{{_tex(text)}}}}} \\"]


def _means_of(comparison: Comparison, benchmark: str) -> list[Mean]:
    return [mean for mean in comparison.means if mean.benchmark == benchmark]


def _tex_mean(mean: Mean, compared: Sequence[str]) -> str:
    cells = []
    for cell in mean.cells:
        if cell is None or cell["value"] is None:
            cells.append("--")
        else:
            value, low, high = (100 * cell[key] for key in ("value", "low", "high"))
            cells.append(f"{value:.1f} [{low:.1f}, {high:.1f}]")
    gap = ["--"] * len(compared)
    return " & ".join(["", _tex(mean.title), *cells[:2], *gap, *cells[2:]]) + r" \\"


def as_tex(comparison: Comparison, title: str) -> str:
    """A table for a paper; it needs the booktabs package."""
    main, others, paired = _order(comparison)
    compared = ["Paired $p$", "$p$ (Holm)"] if paired else []
    head = ["Benchmark", "Metric", *main, *compared, *others]
    lines = []
    last = None
    last_rows = {row.benchmark: row for row in comparison.rows}
    for row in comparison.rows:
        cells = [_tex_cell(cell) for cell in row.cells]
        test = [_tex_p(_test_text(row)), _tex_p(_adjusted_text(row))]
        name = "" if row.benchmark == last else _tex(row.benchmark)
        if last is not None and name:
            lines.append(r"\midrule")
        last = row.benchmark
        texts = [name, _tex(metric_title(row.metric)), *cells[:2], *(test if paired else [])]
        lines.append(" & ".join([*texts, *cells[2:]]) + r" \\")
        lines += _tex_reference(row, len(head))
        if row is last_rows[row.benchmark]:
            lines += [_tex_mean(mean, compared) for mean in _means_of(comparison, row.benchmark)]
    labels = [text if text in compared else _tex(text) for text in head]
    caption = f"{_tex(title)}. Rates in per cent with Wilson 95\\,\\% intervals"
    caption += "; paired $p$ by McNemar's exact test, adjusted by Holm over the table" * paired
    caption += "."
    if any((row.benchmark, row.metric) in PUBLISHED for row in comparison.rows):
        caption += f" In italics: as printed in {SOURCE}, not computed here."
    for run in comparison.runs:
        caption += "".join(f" {_tex(n)}" for n in condition_notes(run.label, run.manifest))
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
