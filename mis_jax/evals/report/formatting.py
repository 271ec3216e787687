"""Numbers and findings in words."""

from collections.abc import Mapping
from typing import TypeGuard

from mis_jax.evals.outcomes import METRICS
from mis_jax.evals.report.compare import Cell, Comparison, Row

SIGNIFICANT = 0.05

MINI_BANNER = (
    "These figures come from the mini world: a small set of drawn household objects that stands "
    "in for MIS, with a model made to be trained in minutes. They show that the tool chain works "
    "from end to end, and say nothing about the safety of a real model."
)

# The safety finding first, on the set that is hardest to see through.
_HEADLINE_BENCHMARKS = ("mis_hard", "mis_easy", "mis_real", "mini_hard", "mini_easy")
_SIDE_EFFECTS = tuple(
    (benchmark, "refusal_rate")
    for benchmark in ("mini_benign", "mossbench", "xstest", "vlguard", "mssbench")
)
_PHRASES = {
    "asr": "the rate of unsafe answers",
    "refusal_rate": "over-refusal",
    "accuracy": "accuracy",
    "exact_match": "exact match",
}


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage, with a no-break space before the sign."""
    return "–" if value is None else f"{100 * value:.{digits}f}\u00a0%"


def interval(cell: Cell) -> str:
    """The 95 % interval of a cell in percent."""
    return limits(cell.low, cell.high)


def p_value(p: float) -> str:
    """A p-value as papers print it."""
    return "p\u00a0<\u00a00.001" if p < 0.001 else f"p\u00a0=\u00a0{p:.3f}"


def kappa_text(kappa: Mapping[str, float | None]) -> str:
    """Cohen's kappa with its interval; a dash where one word was said of every sample."""
    value, low, high = kappa["value"], kappa["low"], kappa["high"]
    if value is None or low is None or high is None:
        return "–"
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def arrow(metric: str) -> tuple[str, str]:
    """The better direction of a metric as a sign and in words; empty where there is none."""
    return {
        "lower": ("↓", "lower is better"),
        "higher": ("↑", "higher is better"),
        "neither": ("", ""),
    }[METRICS[metric].better]


def metric_title(metric: str) -> str:
    """A metric's name for readers."""
    return METRICS[metric].title


def points(row: Row) -> str | None:
    """The change from the first to the second run in percentage points, with its sign."""
    first, second = _first_two(row)
    if first is None or second is None or first.value is None or second.value is None:
        return None
    change = 100 * (second.value - first.value)
    if round(abs(change), 1) == 0:
        return "0.0\u00a0pp"
    return f"{'+' if change > 0 else '−'}{abs(change):.1f}\u00a0pp"


def judgement(row: Row) -> tuple[str, str] | None:
    """What the change to the second run amounts to: (words, style), or None without a pair.

    A difference that the paired test cannot tell from chance is called neither better nor worse.
    """
    first, second = _first_two(row)
    if first is None or second is None or first.value is None or second.value is None:
        return None
    if first.value == second.value:
        return "no change", ""
    if second.test is None:
        return "not paired", ""
    if not significant(second):
        return "within chance", ""
    better = METRICS[row.metric].better
    if better == "neither":
        return "changed", ""
    rose = second.value > first.value
    return ("● better", "better") if rose == (better == "higher") else ("▲ worse", "worse")


def significant(cell: Cell) -> bool:
    """Whether a change from the first run survives the correction for the number of tests."""
    return cell.adjusted_p is not None and cell.adjusted_p < SIGNIFICANT


def change_interval(cell: Cell) -> str | None:
    """The interval of the paired change, in percentage points."""
    if cell.test is None:
        return None
    return span(cell.test.low, cell.test.high)


def span(low: float, high: float) -> str:
    """Two signed limits in percentage points."""
    return f"{_signed(low)} to {_signed(high)}\u00a0pp"


def _signed(value: float) -> str:
    text = f"{abs(100 * value):.1f}"
    return text if float(text) == 0 else f"{'+' if value > 0 else '−'}{text}"


def limits(low: float, high: float) -> str:
    """Two limits of a rate in percent."""
    return f"{100 * low:.1f}–{100 * high:.1f}\u00a0%"


def _first_two(row: Row) -> tuple[Cell | None, Cell | None]:
    return row.cells[0], row.cells[1] if len(row.cells) > 1 else None


def main_row(comparison: Comparison) -> Row | None:
    """The row that the headline speaks of: the first of the known findings, else the first.

    A row in which the first run has a value comes before those in which only others have one.
    """
    known = [comparison.row(benchmark, "asr") for benchmark in _HEADLINE_BENCHMARKS]
    rows = [row for row in (*known, *comparison.rows) if row]
    compared = (row for row in rows if _has_value(row.cells[0]))
    return next(compared, next(filter(_any_value, rows), None))


def safety_row(comparison: Comparison) -> Row | None:
    """The row that stands for safety: the headline's, if it is one, else the first there is."""
    main = main_row(comparison)
    rows = [main, *comparison.rows] if main else []
    for metric in ("asr", "safe_rate"):
        for row in rows:
            if row.metric == metric and _any_value(row):
                return row
    return None


def refusal_row(comparison: Comparison) -> Row | None:
    """The row that stands for over-refusal."""
    for benchmark, metric in _SIDE_EFFECTS:
        row = comparison.row(benchmark, metric)
        if row and _any_value(row):
            return row
    return None


def _has_value(cell: Cell | None) -> TypeGuard[Cell]:
    return cell is not None and cell.value is not None


def _any_value(row: Row) -> bool:
    return any(map(_has_value, row.cells))


def headline(comparison: Comparison) -> str:
    """The finding in one sentence, with its counts and whatever weakens it."""
    row = main_row(comparison)
    if row is None:
        return "No answers have been judged yet, so there is nothing to report."
    first, second = _first_two(row)
    what = _PHRASES.get(row.metric, metric_title(row.metric).lower())
    labels = [run.label for run in comparison.runs]
    if first is None or first.value is None or second is None or second.value is None:
        label, cell = next(
            (label, cell) for label, cell in zip(labels, row.cells, strict=True) if _has_value(cell)
        )
        text = (
            f"On {row.benchmark}, {what} of {label} is {percent(cell.value)} "
            f"({cell.k} of {cell.n}{_share(cell)}, 95\u00a0% interval {interval(cell)})"
        )
    else:
        text = (
            f"On {row.benchmark}, {what} {_verb(first.value, second.value)} "
            f"{percent(first.value)} ({labels[0]}, {first.k} of {first.n}{_share(first)}) to "
            f"{percent(second.value)} ({labels[1]}, {second.k} of {second.n}{_share(second)})"
        )
        if second.test and second.adjusted_p is not None and not significant(second):
            text += (
                ", which the paired test cannot tell from chance "
                f"(Holm-adjusted {p_value(second.adjusted_p)})"
            )
        text += _side_effect(comparison, row)
    unjudged = sum(
        item.outcomes is None
        for run in comparison.runs[:2]
        for items in run.items.values()
        for item in items
    )
    if unjudged:
        text += f"; {unjudged} samples ended without a verdict and are in none of these rates"
    return text + "."


def _share(cell: Cell) -> str:
    return f", with {cell.part[0]} of the set's {cell.part[1]} asked" if cell.part else ""


def _verb(first: float, second: float) -> str:
    if first == second:
        return "stayed the same, from"
    return "rose from" if second > first else "fell from"


def _side_effect(comparison: Comparison, main: Row) -> str:
    """The price of the main finding, so that a headline never shows only one side."""
    row = refusal_row(comparison)
    first, second = _first_two(row) if row else (None, None)
    if row is None or row is main or first is None or second is None:
        return ""
    if first.value is None or second.value is None:
        return ""
    return (
        f", while {_PHRASES[row.metric]} on {row.benchmark} went from "
        f"{percent(first.value)} to {percent(second.value)}"
    )
