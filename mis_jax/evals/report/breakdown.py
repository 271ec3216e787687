"""The same metrics by category, and their plain means over categories or halves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mis_jax.evals.benchmarks import get_benchmark
from mis_jax.evals.outcomes import METRICS
from mis_jax.evals.scoring import Run, groups_of, metric_votes
from mis_jax.evals.stats import cluster_mean, macro, rate
from mis_jax.evals.types import Item

FEW = 30
"""Below this many judged samples a category's rate is greyed: its interval spans tens of points."""

SORTED_BY = ("category", "sub_category", "subset")

_HALVES = ("safe_accuracy", "unsafe_accuracy")
_SHOWN = ("asr", "safe_rate", "refusal_rate", "exact_match", "accuracy", *_HALVES)
_HIDES = {"asr": "safe_rate", "exact_match": "accuracy"}


@dataclass(frozen=True)
class Part:
    """One category under one metric, with a count for each run (None where it was not run)."""

    benchmark: str
    metric: str
    fact: str
    name: str
    cells: list[dict[str, Any] | None]


@dataclass(frozen=True)
class Mean:
    """A mean of rates that each count alike, or a rate over pairs of samples."""

    benchmark: str
    metric: str
    name: str
    title: str
    detail: str
    """What it is taken over."""
    cells: list[dict[str, Any] | None]


def shown_parts(parts: Sequence[Part]) -> list[Part]:
    """The categories that a page shows; CSV and JSON hold those of every metric."""
    hidden = {(part.benchmark, _HIDES[part.metric]) for part in parts if part.metric in _HIDES}
    return [
        part
        for part in parts
        if part.metric in _SHOWN and (part.benchmark, part.metric) not in hidden
    ]


def by_category(runs: Sequence[Run], benchmark: str) -> list[Part]:
    """Every metric by every fact that sorts the samples into two categories or more."""
    parts = []
    for metric in get_benchmark(benchmark).metrics:
        for fact in SORTED_BY:
            sorted_votes = [_sorted_votes(run, benchmark, metric, fact) for run in runs]
            names = sorted({name for votes in sorted_votes for name in votes or ()})
            if len(names) < 2:
                continue
            parts += [
                Part(benchmark, metric, fact, name, [_count(votes, name) for votes in sorted_votes])
                for name in names
            ]
    return parts


def means(runs: Sequence[Run], parts: Sequence[Part], benchmark: str) -> list[Mean]:
    """The first judged metric's macro mean over categories, that of two halves, rates of pairs.

    Published figures of some sets are such means, which differ from the rate over all samples.
    The categories are taken as independent; halves made of twins have both of a pair drawn.
    """
    rates = []
    metrics = get_benchmark(benchmark).metrics
    categories = [part for part in parts if part.fact == "category"]
    categories = [part for part in categories if part.metric == categories[0].metric]
    if set(_HALVES) <= set(metrics):
        cells = [_mean_of_halves(run, benchmark) for run in runs]
        title, detail = (
            "Mean of both halves",
            "safe and unsafe situations, each half counting alike",
        )
        rates.append(Mean(benchmark, _HALVES[0], "mean_accuracy", title, detail, cells))
    elif categories:
        metric = categories[0].metric
        cells = [_mean([part.cells[place] for part in categories]) for place in range(len(runs))]
        title = f"Macro mean over {len(categories)} categories"
        detail = f"{METRICS[metric].title.lower()}, each category counting alike"
        rates.append(Mean(benchmark, metric, f"{metric}_macro", title, detail, cells))
    for metric in get_benchmark(benchmark).over_pairs:
        cells = [run.results.get(benchmark, {}).get("metrics", {}).get(metric) for run in runs]
        if any(cells):
            title, detail = METRICS[metric].title, METRICS[metric].meaning
            rates.append(Mean(benchmark, metric, metric, title, detail, cells))
    return rates


def _mean_of_halves(run: Run, benchmark: str) -> dict[str, Any] | None:
    if benchmark not in run.results:
        return None
    counts = [run.results[benchmark]["metrics"][metric] for metric in _HALVES]
    if not all(count["n"] for count in counts):
        return None  # half of a mean of two halves is not their mean
    mean = macro([(count["k"], count["n"]) for count in counts])
    items = run.items[benchmark]
    votes = [metric_votes(items, metric) for metric in _HALVES]
    limits = cluster_mean(votes, groups_of(items))
    return mean | (dict(zip(("low", "high"), limits, strict=True)) if limits else {})


def _mean(cells: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    counts = [(cell["k"], cell["n"]) for cell in cells if cell is not None]
    return macro(counts) if counts else None


def _sorted_votes(run: Run, benchmark: str, metric: str, fact: str) -> dict[str, list[bool]] | None:
    if benchmark not in run.items:
        return None
    items: dict[str, Item] = {item.id: item for item in run.items[benchmark]}
    votes: dict[str, list[bool]] = {}
    for key, vote in metric_votes(run.items[benchmark], metric).items():
        name = items[key].facts.get(fact)
        if name is not None:
            votes.setdefault(str(name), []).append(vote)
    return votes


def _count(votes: dict[str, list[bool]] | None, name: str) -> dict[str, Any] | None:
    if votes is None:
        return None
    own = votes.get(name, [])
    return rate(sum(own), len(own))
