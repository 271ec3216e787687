"""The report's drawings, as SVG text that takes its colours and fonts from the page."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mis_jax.evals.files import read_log
from mis_jax.evals.report.compare import Comparison, Row
from mis_jax.evals.report.formatting import metric_title

# Matplotlib wants real colours. These stand for the page's own, which follow light and dark.
INK, QUIET, GRID = "#b00001", "#b00002", "#b00003"
RUN_COLOURS = tuple(f"#a0000{number}" for number in range(6))
_VARIABLES = {INK: "--ink", QUIET: "--quiet", GRID: "--line"} | {
    colour: f"--run{number}" for number, colour in enumerate(RUN_COLOURS)
}
MARKERS = "osD^vP"  # shape tells runs apart where colour cannot

# Narrow on purpose: the drawing is scaled to a phone's width, and its text must stay readable.
WIDTH_INCHES = 4.6
_SPACING = 0.14  # inches between the runs of one metric


def run_colour(number: int) -> str:
    """The stand-in colour of a run; a seventh run shares the first one's."""
    return RUN_COLOURS[number % len(RUN_COLOURS)]


def interval_plot(comparison: Comparison) -> str:
    """Every metric of every run as a point with its 95 % interval, grouped by benchmark."""
    step = _SPACING * max(2, len(comparison.runs)) + 0.1
    heights: list[tuple[float, Row]] = []
    headings: list[tuple[float, str]] = []
    depth = 0.0
    for benchmark in comparison.benchmarks:
        headings.append((depth + 0.1, benchmark))
        depth += 0.32
        for row in (row for row in comparison.rows if row.benchmark == benchmark):
            heights.append((depth + step / 2, row))
            depth += step
        depth += 0.12
    figure, axes = bare_axes(depth + 0.5)
    for y, name in headings:
        axes.text(
            -0.44,
            y,
            name,
            color=INK,
            fontsize=9,
            fontweight="bold",
            va="center",
            transform=axes.get_yaxis_transform(),
        )
    for y, row in heights:
        axes.text(
            -0.04,
            y,
            metric_title(row.metric),
            color=INK,
            fontsize=8.5,
            ha="right",
            va="center",
            transform=axes.get_yaxis_transform(),
        )
        axes.axhline(y + step / 2, color=GRID, linewidth=0.5)
        for number, cell in enumerate(row.cells):
            if cell is None or cell.value is None:
                continue
            place = y + (number - (len(row.cells) - 1) / 2) * _SPACING
            axes.plot(
                [100 * cell.low, 100 * cell.high],
                [place, place],
                color=run_colour(number),
                linewidth=2.2,
                solid_capstyle="round",
            )
            axes.plot(
                [100 * cell.value],
                [place],
                MARKERS[number % len(MARKERS)],
                color=run_colour(number),
                markersize=5.5,
            )
    axes.set_xlim(-2, 102)
    axes.set_ylim(depth, -0.05)
    axes.set_yticks([])
    axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    figure.subplots_adjust(left=0.3, right=0.96, top=0.995, bottom=0.28 / (depth + 0.5))
    return as_svg(
        figure,
        "intervals",
        "Every metric of every run with its 95 % interval; the same figures stand in the table.",
    )


def loss_plot(metrics: Path) -> str:
    """The training loss by step; a long curve also as a moving mean."""
    points = read_loss(metrics)
    figure, axes = bare_axes(2.7)
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    reach = len(points) // 60  # of the moving mean, to either side
    axes.plot(
        steps,
        losses,
        color=RUN_COLOURS[1],
        linewidth=0.8 if reach else 1.4,
        alpha=0.45 if reach else 1.0,
    )
    if reach:
        around = [losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses))]
        axes.plot(
            steps, [sum(part) / len(part) for part in around], color=RUN_COLOURS[1], linewidth=2
        )
    axes.set_xlabel("step", color=QUIET, fontsize=9)
    axes.set_ylabel("loss", color=QUIET, fontsize=9)
    axes.set_ylim(bottom=0 if min(losses) >= 0 else None)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    figure.subplots_adjust(left=0.13, right=0.97, top=0.97, bottom=0.17)
    return as_svg(
        figure,
        "loss",
        f"Training loss from {losses[0]:.3g} at step {steps[0]} to "
        f"{losses[-1]:.3g} at step {steps[-1]}.",
    )


def read_loss(metrics: Path) -> list[tuple[int, float]]:
    """(step, loss) of a training log. Steps that a restart repeated keep their last value."""
    if not metrics.is_file():
        raise ValueError(f"{metrics} does not exist; give the metrics.jsonl of a training run")
    points = {
        int(row["step"]): float(row["loss"])
        for row in read_log(metrics)
        if "step" in row and row.get("loss") is not None
    }
    finite = sorted((step, loss) for step, loss in points.items() if math.isfinite(loss))
    if not finite:
        raise ValueError(f"{metrics} has no finite 'loss' beside a 'step'; leave the curve out")
    return finite


def bare_axes(height: float) -> tuple[Figure, Axes]:
    """A transparent figure of the page's width with a baseline and nothing else."""
    figure = Figure(figsize=(WIDTH_INCHES, height))
    axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=8.5, length=0)
    axes.set_axisbelow(True)
    return figure, axes


def as_svg(figure: Figure, prefix: str, description: str) -> str:
    """The figure as an ``<svg>`` element for inlining: no prologue, no outside names, own ids."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(?::\w+)?="[^"]*"', "", text)  # HTML knows svg without being told
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'font: ((?:\w+ )*[\d.]+px) [^;"]*', r"font: \1 var(--sans)", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # Fixed sizes in points would overrule the page's width.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    label = description.replace("&", "&amp;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
