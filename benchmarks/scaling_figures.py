"""Figures of `benchmarks.scaling` for the docs: SVG on white, so that they read on any page."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ASSETS = Path(__file__).parent.parent / "docs" / "assets"
_COLOURS = {"v5e": "#0072b2", "v6e": "#d55e00", "v5p": "#009e73"}
_MARKS = {"v5e": "o", "v6e": "s", "v5p": "^"}
_GIB = 2**30
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "grid.color": "#e5e5e5",
    "svg.hashsalt": "mis-jax",  # the same points give the same file
    "svg.fonttype": "path",
}
Get = Callable[[dict[str, Any]], float | None]


def draw_mesh(points: Sequence[dict[str, Any]]) -> None:
    """Memory, traffic, time and MFU against the number of chips."""
    panels: list[tuple[str, Get]] = [
        ("memory of a chip, GiB", lambda p: p["memory_gib"]["total"]),
        ("received by a chip in a step, GB", lambda p: _maybe(p["received_bytes"], 1e-9)),
        ("step at best, s", lambda p: p["predicted_step_s"]),
        ("MFU at best, %", lambda p: _maybe(p.get("mfu"), 100)),
    ]
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(8, 6), sharex=True)
        for axis, (title, get) in zip(axes.flat, panels, strict=True):
            for chip, colour in _COLOURS.items():
                own = [p for p in points if p["topology"].startswith(chip)]
                full = sorted((p for p in own if not p["lora_rank"]), key=lambda p: p["chips"])
                style: dict[str, Any] = dict(color=colour, marker=_MARKS[chip])
                _line(axis, [(p["chips"], get(p)) for p in full if _fits(p)], label=chip, **style)
                for point in own:
                    if not _fits(point) and title.startswith("memory"):
                        axis.plot(point["chips"], get(point), "x", color=colour, markersize=8)
                    elif point["lora_rank"] and get(point) is not None:
                        style["markerfacecolor"] = "white"
                        axis.plot(point["chips"], get(point), linestyle="", **style)
            axis.set_title(title)
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted({p["chips"] for p in points}))
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
            axis.minorticks_off()
            axis.set_ylim(0, 1.06 * axis.dataLim.y1)
        for axis in axes[1]:
            axis.set_xlabel("chips")
        axes[0, 0].legend(frameon=False)
        _save(figure, "scaling-mesh.svg")


def draw_step(points: Sequence[dict[str, Any]]) -> None:
    """Operations, memory and time of a cut model's step against what is in it."""
    rows: list[tuple[str, Get]] = [
        ("model operations, TFLOP", lambda p: p["flops_per_step"] / 1e12),
        ("temporaries, GiB", lambda p: p["memory_gib"]["temporaries"]),
        ("step at best, ms", lambda p: _maybe(p["predicted_step_s"], 1e3)),
    ]
    _grid(points, rows, "scaling-step.svg")


def draw_timed(points: Sequence[dict[str, Any]]) -> None:
    """Seconds of a cut model's step on a CPU."""
    _grid(points, [("step, s", lambda p: p["median_s"])], "scaling-timed.svg")


def _grid(points: Sequence[dict[str, Any]], rows: Sequence[tuple[str, Get]], name: str) -> None:
    columns: list[tuple[str, str, Callable[[dict[str, Any]], Any]]] = [
        ("size", "model", lambda p: p["model"].rsplit("-", 1)[1].upper()),
        ("tokens", "tokens of a row, one tile", lambda p: p["tokens"] / 1024),
        ("tiles", "tiles of a row of {tokens} tokens", lambda p: p["tiles"]),
        ("packing", "four samples of 1,024 tokens", _laid_out),
    ]
    with plt.rc_context(_STYLE):
        height = 1 + 1.9 * len(rows)
        figure, axes = plt.subplots(len(rows), 4, figsize=(10, height), squeeze=False)
        for column, (curve, title, place) in enumerate(columns):
            own = [p for p in points if p["curve"] == curve]
            for row, (label, get) in enumerate(rows):
                axis = axes[row, column]
                pairs = [(place(p), get(p)) for p in own]
                if curve in ("size", "packing"):
                    names, values = [x for x, _ in pairs], [y or 0 for _, y in pairs]
                    axis.bar(names, values, color="#0072b2", width=0.6)
                else:
                    _line(axis, sorted(pairs), color="#0072b2", marker="o")
                    axis.set_xlim(left=0)
                axis.set_ylim(0, 1.06 * max((y or 0 for _, y in pairs), default=1))
                if not column:
                    axis.set_ylabel(label)
            words = title.format(tokens=f"{own[0]['tokens']:,}") if own else title
            axes[0, column].set_title(words)
        axes[-1, 1].set_xlabel("thousand tokens (1,024)")
        axes[-1, 2].set_xlabel("tiles")
        _save(figure, name)


def _laid_out(point: dict[str, Any]) -> str:
    if point["packed"]:
        return "packed"
    return "own\nlength" if point["tokens"] == 1024 else "padded\nto 4,096"


def _line(axis: Any, pairs: Sequence[tuple[float, float | None]], **style: Any) -> None:
    known = [(x, y) for x, y in pairs if y is not None]
    axis.plot([x for x, _ in known], [y for _, y in known], **style)


def _fits(point: dict[str, Any]) -> bool:
    return point["memory_gib"]["left"] >= 0


def _maybe(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(ASSETS / name, facecolor="white", metadata={"Date": None})
    plt.close(figure)
