"""The HTML page: everything prepared here, laid out by `page.html.j2`."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mis_jax.evals.outcomes import METRICS
from mis_jax.evals.report import formatting
from mis_jax.evals.report.breakdown import FEW, Part, shown_parts
from mis_jax.evals.report.compare import Comparison, Row
from mis_jax.evals.report.plots import interval_plot, loss_plot, read_loss, scatter_plot
from mis_jax.evals.report.published_results import MODELS, PUBLISHED, SOURCE
from mis_jax.evals.report.samples import CHANGES, CHOICE, browse, choose_examples, load_samples
from mis_jax.evals.types import COUNT_STATES
from mis_jax.storage.files import package_text


def as_html(
    comparison: Comparison,
    *,
    title: str,
    loss_curve: Path | None,
    data_root: Path | None,
    redact: bool,
) -> str:
    """The whole page as one file that loads nothing from anywhere."""
    environment = Environment(
        loader=PackageLoader("mis_jax.evals.report", "."),
        autoescape=True,  # answers are a model's text: they must never become markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": formatting.percent,
        "limits": formatting.limits,
        "span": formatting.span,
        "interval": formatting.interval,
        "p_value": formatting.p_value,
        "points": formatting.points,
        "judgement": formatting.judgement,
        "arrow": formatting.arrow,
        "metric_title": formatting.metric_title,
        "kappa_text": formatting.kappa_text,
    }
    main = formatting.main_row(comparison)
    samples = {} if redact or data_root is None else load_samples(comparison, data_root)
    script = package_text("mis_jax.evals.report", "page.js")
    browser = browse(comparison, samples, redact)
    return environment.get_template("page.html.j2").render(
        title=title,
        headline=formatting.headline(comparison),
        banner=formatting.MINI_BANNER if comparison.only_mini else None,
        runs=comparison.runs,
        rows=comparison.rows,
        benchmarks=comparison.benchmarks,
        notes=comparison.notes,
        metrics=METRICS,
        hero=_hero(main),
        intervals=interval_plot(comparison) if comparison.rows else None,
        loss=_loss(loss_curve),
        scatter=_scatter(comparison),
        means=comparison.means,
        has_groups=comparison.has_groups,
        published=PUBLISHED,
        differences=comparison.differences,
        has_published=any((row.benchmark, row.metric) in PUBLISHED for row in comparison.rows),
        source=SOURCE,
        models=MODELS,
        breakdowns=_breakdowns(comparison),
        few=FEW,
        refusals=[line for line in comparison.refusals if line.cells or line.rate["k"]],
        corrections=comparison.corrections,
        rechecks=comparison.rechecks,
        examples=[] if redact else choose_examples(comparison, samples),
        choice=CHOICE,
        browser=browser,
        places={
            "benchmarks": _places(browser.benchmarks),
            "categories": _places(browser.categories),
            "verdicts": _places(browser.verdicts),
            "changes": _places(CHANGES),
        },
        changes=CHANGES,
        script=Markup(script),
        script_hash=_script_hash(script),
        redact=redact,
        states=COUNT_STATES,
        account=_account(comparison),
        bounded=_bounded(comparison),
    )


def _places(names: Sequence[str]) -> dict[str, int]:
    """Numbers in place of names: a page repeats them for every sample."""
    return {name: place for place, name in enumerate(names)}


def _script_hash(script: str) -> str:
    """The page's one script as its policy names it, so that no other may run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def _scatter(comparison: Comparison) -> dict[str, Any] | None:
    plot = scatter_plot(comparison)
    return {"drawing": plot[0], "caption": plot[1]} if plot else None


def _breakdowns(comparison: Comparison) -> list[dict[str, Any]]:
    """The parts of one benchmark, metric and fact together, each a table of its own."""
    tables: dict[tuple[str, str, str], list[Part]] = {}
    for part in shown_parts(comparison.parts):
        tables.setdefault((part.benchmark, part.metric, part.fact), []).append(part)
    return [
        {"benchmark": benchmark, "metric": metric, "fact": fact.replace("_", "-"), "parts": parts}
        for (benchmark, metric, fact), parts in tables.items()
    ]


def _hero(row: Row | None) -> Row | None:
    """The row for the large figures: only where there is something in its first cell."""
    if row is None or row.cells[0] is None or row.cells[0].value is None:
        return None
    return row


def _loss(loss_curve: Path | None) -> dict[str, Any] | None:
    if loss_curve is None:
        return None
    points = read_loss(loss_curve)
    return {
        "drawing": loss_plot(points),
        "first": points[0],
        "last": points[-1],
    }


def _account(comparison: Comparison) -> list[dict[str, Any]]:
    """How the samples of each run and benchmark ended, and at which stage the lost ones stuck."""
    lines = []
    for name in comparison.benchmarks:
        for number, run in enumerate(comparison.runs):
            if name not in run.results:
                continue
            stuck = [item.stage for item in run.items[name] if item.state != "ok"]
            lines.append(
                {
                    "benchmark": name,
                    "label": run.label,
                    "number": number,
                    "n": run.results[name]["n"],
                    "counts": run.results[name]["counts"],
                    "generate": stuck.count("generate"),
                    "judge": stuck.count("judge"),
                    "cut": sum(item.finish_reason == "length" for item in run.items[name]),
                }
            )
    return lines


def _bounded(comparison: Comparison) -> list[dict[str, Any]]:
    """Metrics whose value depends on samples without a verdict, with their worst cases."""
    return [
        {"row": row, "label": run.label, "cell": cell}
        for row in comparison.rows
        for run, cell in zip(comparison.runs, row.cells, strict=True)
        if cell and cell.bounds
    ]
