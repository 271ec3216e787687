"""Safety against over-refusal: a model that refuses everything is safe and useless."""

from __future__ import annotations

from mis_jax.evals.report.compare import Cell, Comparison, Row
from mis_jax.evals.report.formatting import percent, refusal_row, safety_row
from mis_jax.evals.report.plots import GRID, INK, MARKERS, QUIET, as_svg, bare_axes, run_colour

_HEIGHT_INCHES = 3.9


def unsafe(row: Row, cell: Cell) -> tuple[float | None, float, float]:
    """The share of unsafe answers with its interval, from a row that counts either side."""
    if cell.value is None or row.metric == "asr":
        return cell.value, cell.low, cell.high
    return 1 - cell.value, 1 - cell.high, 1 - cell.low


def scatter_plot(comparison: Comparison) -> tuple[str, str] | None:
    """(drawing, caption), each run a point with both intervals; None where no run has both."""
    safety, refusal = safety_row(comparison), refusal_row(comparison)
    if safety is None or refusal is None:
        return None
    points: dict[int, tuple[tuple[float, float, float], tuple[float, float, float]]] = {}
    for number, (one, two) in enumerate(zip(safety.cells, refusal.cells, strict=True)):
        if one is None or two is None or two.value is None:
            continue
        value, low, high = unsafe(safety, one)
        if value is not None:
            points[number] = ((two.value, two.low, two.high), (value, low, high))
    if not points:
        return None
    figure, axes = bare_axes(_HEIGHT_INCHES)
    axes.grid(color=GRID, linewidth=0.7)
    if 0 in points and 1 in points:
        (x0, *_), (y0, *_) = points[0]
        (x1, *_), (y1, *_) = points[1]
        axes.annotate(
            "",
            (100 * x1, 100 * y1),
            (100 * x0, 100 * y0),
            arrowprops={"arrowstyle": "->", "color": QUIET, "linewidth": 1, "shrinkA": 7,
                        "shrinkB": 7},
        )  # fmt: skip
    for number, ((x, left, right), (y, low, high)) in points.items():
        colour = run_colour(number)
        axes.plot([100 * left, 100 * right], [100 * y, 100 * y], color=colour, linewidth=1.8)
        axes.plot([100 * x, 100 * x], [100 * low, 100 * high], color=colour, linewidth=1.8)
        marker = MARKERS[number % len(MARKERS)]
        axes.plot([100 * x], [100 * y], marker, color=colour, markersize=7.5)
    ticks = [0, 25, 50, 75, 100]
    axes.set_xlim(-3, 103)
    axes.set_ylim(-3, 103)
    axes.set_xticks(ticks, ["0", "25", "50", "75", "100 %"])
    axes.set_yticks(ticks, ["0", "25", "50", "75", "100 %"])
    axes.set_xlabel(f"harmless questions declined ({refusal.benchmark})", color=INK, fontsize=9)
    axes.set_ylabel(f"unsafe answers ({safety.benchmark})", color=INK, fontsize=9)
    figure.subplots_adjust(left=0.155, right=0.96, top=0.975, bottom=0.135)
    told = "; ".join(
        f"{comparison.runs[number].label}: {percent(y)} unsafe, {percent(x)} declined"
        for number, ((x, *_), (y, *_)) in points.items()
    )
    caption = (
        f"Unsafe answers on {safety.benchmark} against harmless questions declined on "
        f"{refusal.benchmark}; the lower left corner is best."
    )
    return as_svg(figure, "scatter", f"{caption} {told}."), caption
