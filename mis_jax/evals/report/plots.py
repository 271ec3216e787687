"""The report's drawings: SVG elements that take their colours and their font from the page."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from markupsafe import Markup

from mis_jax.evals.report.compare import Cell, Comparison, Row
from mis_jax.evals.report.formatting import metric_title, percent, refusal_row, safety_row
from mis_jax.storage.jsonl import read_log

# Narrow on purpose: the drawing is scaled to a phone's width, and its text must stay readable.
WIDTH = 331.2
INK, QUIET, GRID = "var(--ink)", "var(--quiet)", "var(--line)"

# One unit wide around 0, 0: circle, square, diamond, triangles, cross. Shape tells runs apart where
# colour cannot.
_MARKERS = (
    "M-.5 0a.5 .5 0 1 0 1 0a.5 .5 0 1 0-1 0z",
    "M-.5-.5h1v1h-1z",
    "M0-.7L.7 0 0 .7-.7 0z",
    "M0-.5L.5 .5H-.5z",
    "M0 .5L.5-.5H-.5z",
    "M-.17-.5h.34v.33h.33v.34h-.33v.33h-.34v-.33h-.33v-.34h.33z",
)
_SPACING = 10.0  # between the runs of one metric
_PERCENT_TICKS = [(0, "0"), (25, "25"), (50, "50"), (75, "75"), (100, "100 %")]

Place = tuple[float, float]


@dataclass(frozen=True)
class _Axes:
    """A rectangle of a drawing and the values at its edges; y counts from `top` down."""

    left: float
    right: float
    top: float
    bottom: float
    x_limits: tuple[float, float]
    y_limits: tuple[float, float]
    """The values at the bottom and at the top."""

    def place(self, x: float, y: float) -> Place:
        """Where a point of the data is drawn."""
        (x0, x1), (y0, y1) = self.x_limits, self.y_limits
        return (
            self.left + (x - x0) / (x1 - x0) * (self.right - self.left),
            self.bottom - (y - y0) / (y1 - y0) * (self.bottom - self.top),
        )

    def x_axis(self, ticks: Iterable[tuple[float, str]], *, grid: bool) -> list[Markup]:
        """The baseline with its labels below, and a line up from each."""
        y0 = self.y_limits[0]
        places = [(self.place(x, y0)[0], label) for x, label in ticks]
        lines = [_line((x, self.top), (x, self.bottom), GRID, 0.7) for x, _ in places if grid]
        labels = [_text((x, self.bottom + 10), text, QUIET, anchor="middle") for x, text in places]
        baseline = _line((self.left, self.bottom), (self.right, self.bottom), QUIET, 0.8)
        return [*lines, *labels, baseline]

    def y_axis(self, ticks: Iterable[tuple[float, str]]) -> list[Markup]:
        """Lines across, each with its label on the left."""
        places = [(self.place(self.x_limits[0], y)[1], label) for y, label in ticks]
        lines = [_line((self.left, y), (self.right, y), GRID, 0.7) for y, _ in places]
        labels = [_text((self.left - 4, y + 3), text, QUIET, anchor="end") for y, text in places]
        return lines + labels

    def titles(self, x: str, y: str, colour: str) -> list[Markup]:
        """The names of both axes."""
        below = ((self.left + self.right) / 2, self.bottom + 24)
        beside = (self.left - 34, (self.top + self.bottom) / 2)
        return [
            _text(below, x, colour, 9, "middle"),
            _text(beside, y, colour, 9, "middle", turned=True),
        ]


def run_colour(number: int) -> str:
    """The page's colour of a run; a seventh run shares the first one's."""
    return f"var(--run{number % len(_MARKERS)})"


def interval_plot(comparison: Comparison) -> Markup:
    """Every metric of every run as a point with its 95 % interval, grouped by benchmark."""
    step = _SPACING * max(2, len(comparison.runs)) + 7
    rows: list[tuple[float, Row]] = []
    headings: list[tuple[float, str]] = []
    y = 5.0
    for benchmark in comparison.benchmarks:
        headings.append((y + 7, benchmark))
        y += 23
        for row in (row for row in comparison.rows if row.benchmark == benchmark):
            rows.append((y + step / 2, row))
            y += step
        y += 9
    axes = _Axes(104, 0.96 * WIDTH, 1, y, (-2, 102), (y, 0))
    parts = axes.x_axis(_PERCENT_TICKS, grid=True)
    parts += [_text((3, y + 3), name, INK, 9, bold=True) for y, name in headings]
    for y, row in rows:
        parts.append(_text((axes.left - 8, y + 3), metric_title(row.metric), INK, anchor="end"))
        below = y + step / 2
        parts.append(_line((axes.left, below), (axes.right, below), GRID, 0.5))
        for number, cell in enumerate(row.cells):
            if cell is None or cell.value is None:
                continue
            own = y + (number - (len(row.cells) - 1) / 2) * _SPACING
            low, value, high = (
                (axes.place(100 * rate, 0)[0], own) for rate in (cell.low, cell.value, cell.high)
            )
            parts.append(_line(low, high, run_colour(number), 2.2, cap="round"))
            parts.append(_marker(value, number, 6.5))
    description = (
        "Every metric of every run with its 95 % interval; the same figures stand in the table."
    )
    return _svg(axes.bottom + 18, description, parts)


def scatter_plot(comparison: Comparison) -> tuple[Markup, str] | None:
    """(drawing, caption) of unsafe answers against over-refusal; None where no run has both.

    Each run is a point with both intervals: a model that refuses everything is safe and useless.
    """
    safety, refusal = safety_row(comparison), refusal_row(comparison)
    if safety is None or refusal is None:
        return None
    points: dict[int, tuple[tuple[float, float, float], tuple[float, float, float]]] = {}
    for number, (safe, declined) in enumerate(zip(safety.cells, refusal.cells, strict=True)):
        if safe is None or declined is None or declined.value is None:
            continue
        value, low, high = _unsafe(safety, safe)
        if value is not None:
            points[number] = ((declined.value, declined.low, declined.high), (value, low, high))
    if not points:
        return None
    height = 280.0
    axes = _Axes(51, 0.96 * WIDTH, 7, height - 38, (-0.03, 1.03), (-0.03, 1.03))
    ticks = [(value / 100, label) for value, label in _PERCENT_TICKS]
    parts = axes.x_axis(ticks, grid=True) + axes.y_axis(ticks)
    if 0 in points and 1 in points:
        first, second = (axes.place(points[n][0][0], points[n][1][0]) for n in (0, 1))
        parts += _arrow(first, second)
    for number, ((x, left, right), (y, low, high)) in points.items():
        for begin, end in (((left, y), (right, y)), ((x, low), (x, high))):
            parts.append(_line(axes.place(*begin), axes.place(*end), run_colour(number), 1.8))
        parts.append(_marker(axes.place(x, y), number, 8.5))
    parts += axes.titles(
        f"harmless questions declined ({refusal.benchmark})",
        f"unsafe answers ({safety.benchmark})",
        INK,
    )
    figures = "; ".join(
        f"{comparison.runs[number].label}: {percent(y)} unsafe, {percent(x)} declined"
        for number, ((x, *_), (y, *_)) in points.items()
    )
    caption = (
        f"Unsafe answers on {safety.benchmark} against harmless questions declined on "
        f"{refusal.benchmark}; the lower left corner is best."
    )
    return _svg(height, f"{caption} {figures}.", parts), caption


def _unsafe(row: Row, cell: Cell) -> tuple[float | None, float, float]:
    """The share of unsafe answers with its interval, from a row that counts either side."""
    if cell.value is None or row.metric == "asr":
        return cell.value, cell.low, cell.high
    return 1 - cell.value, 1 - cell.high, 1 - cell.low


def loss_plot(points: Sequence[tuple[int, float]]) -> Markup:
    """The training loss by step; a long curve also as a moving mean."""
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    height = 194.0
    margin = 0.04 * (steps[-1] - steps[0]) or 1
    bottom, top = min(0.0, min(losses)), max(losses)
    room = 0.05 * (top - bottom) or 1
    y_limits = (bottom - room if bottom < 0 else 0.0, top + room)
    x_limits = (steps[0] - margin, steps[-1] + margin)
    axes = _Axes(43, 0.97 * WIDTH, 6, height - 34, x_limits, y_limits)
    parts = axes.y_axis(_ticks(*y_limits)) + axes.x_axis(_ticks(*x_limits), grid=False)
    reach = len(points) // 60  # of the moving mean, to either side
    thin, pale = (0.8, 0.45) if reach else (1.4, 1.0)
    parts.append(_curve([axes.place(*point) for point in points], run_colour(1), thin, pale))
    if reach:
        sums = [0.0, *accumulate(losses)]
        means = [
            (sums[end] - sums[begin]) / (end - begin)
            for begin, end in (
                (max(0, i - reach), min(len(losses), i + reach + 1)) for i in range(len(losses))
            )
        ]
        parts.append(_curve(list(map(axes.place, steps, means)), run_colour(1), 2))
    parts += axes.titles("step", "loss", QUIET)
    description = (
        f"Training loss from {losses[0]:.3g} at step {steps[0]} to "
        f"{losses[-1]:.3g} at step {steps[-1]}."
    )
    return _svg(height, description, parts)


def read_loss(metrics: Path) -> list[tuple[int, float]]:
    """(step, loss) of a training log. Steps that a restart repeated keep their last value."""
    if not metrics.is_file():
        raise ValueError(f"{metrics} does not exist; give the metrics.jsonl of a training run")
    points = {
        int(record["step"]): float(record["loss"])
        for record in read_log(metrics)
        if "step" in record and record.get("loss") is not None
    }
    finite = sorted((step, loss) for step, loss in points.items() if math.isfinite(loss))
    if not finite:
        raise ValueError(f"{metrics} has no finite 'loss' beside a 'step'; leave the curve out")
    return finite


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """At most nine round values between two limits, with as many decimals as they need."""
    power = 10.0 ** math.floor(math.log10((high - low) / 8))
    step = next(n * power for n in (1, 2, 2.5, 5, 10) if high - low <= 8 * n * power)
    decimals = next((n for n in range(20) if abs(round(step, n) - step) < step / 1e6), 20)
    values = [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [(value, f"{value:.{decimals}f}") for value in values]


def _svg(height: float, description: str, parts: Iterable[Markup]) -> Markup:
    """A drawing of the page's width; its size in the page is the style sheet's."""
    svg = '<svg role="img" aria-label="{}" viewBox="0 0 {:g} {:.1f}">\n{}\n</svg>\n'
    return Markup(svg).format(description, WIDTH, height, Markup("\n").join(parts))


def _line(begin: Place, end: Place, colour: str, width: float, cap: str = "butt") -> Markup:
    return Markup(
        '<path d="M{:.1f} {:.1f}L{:.1f} {:.1f}" style="stroke: {}; stroke-width: {}; '
        'stroke-linecap: {}"/>'
    ).format(*begin, *end, colour, width, cap)


def _text(
    place: Place,
    text: str,
    colour: str,
    size: float = 8.5,
    anchor: str = "start",
    *,
    bold: bool = False,
    turned: bool = False,
) -> Markup:
    return Markup(
        '<text x="{x:.1f}" y="{y:.1f}"{turn} style="fill: {colour}; font-size: {size}px; '
        'font-weight: {weight}; text-anchor: {anchor}">{text}</text>'
    ).format(
        x=place[0],
        y=place[1],
        turn=Markup(' transform="rotate(-90 {:.1f} {:.1f})"').format(*place) if turned else "",
        colour=colour,
        size=size,
        weight=700 if bold else 400,
        anchor=anchor,
        text=text,
    )


def _marker(place: Place, number: int, size: float) -> Markup:
    return Markup(
        '<path d="{}" transform="translate({:.1f} {:.1f}) scale({})" style="fill: {}"/>'
    ).format(_MARKERS[number % len(_MARKERS)], *place, size, run_colour(number))


def _arrow(begin: Place, end: Place) -> list[Markup]:
    """From one marker to another, without touching them; none where they are too close."""
    length = math.dist(begin, end)
    if length < 20:
        return []
    angle = math.atan2(end[1] - begin[1], end[0] - begin[0])

    def away(place: Place, distance: float, turn: float = 0.0) -> Place:
        return (
            place[0] + distance * math.cos(angle + turn),
            place[1] + distance * math.sin(angle + turn),
        )

    tip = away(end, -7)
    lines = [(away(begin, 7), tip), (away(tip, -4.5, 0.5), tip), (away(tip, -4.5, -0.5), tip)]
    return [_line(*places, QUIET, 1) for places in lines]


def _curve(places: Sequence[Place], colour: str, width: float, opacity: float = 1.0) -> Markup:
    """A line from left to right; of many places in one column the highest and the lowest."""
    columns: dict[int, list[Place]] = {}
    for place in places:
        columns.setdefault(round(2 * place[0]), []).append(place)
    drawn: list[Place] = []
    for column in columns.values():
        by_height = sorted(column, key=lambda place: place[1])
        drawn += column if len(column) < 3 else (by_height[0], by_height[-1])
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
    return Markup(
        '<polyline points="{}" style="fill: none; stroke: {}; stroke-width: {}; '
        'stroke-linejoin: round; opacity: {}"/>'
    ).format(points, colour, width, opacity)
