"""Sample answers for a report, chosen by rule, with their pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mis_jax.evals.benchmarks import get_benchmark
from mis_jax.evals.images import page_image
from mis_jax.evals.metrics import METRICS
from mis_jax.evals.report.compare import Comparison
from mis_jax.evals.run_dir import sample_hash
from mis_jax.evals.scoring import Run
from mis_jax.evals.types import Item, Sample

CHOICE = (
    "Chosen by rule, not by hand: from each benchmark the first sample whose outcome changed for "
    "the better, the first that changed for the worse, and the first that is still wrong."
)


@dataclass(frozen=True)
class Reply:
    """One run's answer to an example; ``text`` is None where there is no answer."""

    label: str
    number: int
    verdict: str
    good: bool | None
    text: str | None


@dataclass(frozen=True)
class Example:
    """One sample with every run's reply; without its data there is no question and no picture."""

    benchmark: str
    id: str
    why: str
    question: str | None
    reference: str | None
    pictures: list[tuple[str, str]]
    """(alternative text, data URL) of each picture."""
    replies: list[Reply]


def choose_examples(
    comparison: Comparison, samples: Mapping[str, Mapping[str, Sample]]
) -> list[Example]:
    """Examples of every benchmark with their texts, and with pictures where samples are given."""
    return [
        _example(comparison, benchmark, key, why, samples.get(benchmark, {}).get(key))
        for benchmark in comparison.benchmarks
        for why, key in _chosen(comparison, benchmark)
    ]


def load_samples(comparison: Comparison, data_root: Path) -> dict[str, dict[str, Sample]]:
    """``{benchmark: {id: sample}}`` of the data root.

    A sample that is not the one a run was asked is left out: data that changed since would put
    another picture beside the answer.
    """
    found: dict[str, dict[str, Sample]] = {}
    for name in comparison.benchmarks:
        benchmark = get_benchmark(name)
        run = next(run for run in comparison.runs if name in run.items)
        asked = {item.id: item.hash for item in run.items[name]}
        found[name] = {
            sample.id: sample
            for sample in benchmark.load(data_root)
            if sample.id in asked and sample_hash(benchmark, sample) == asked[sample.id]
        }
    return found


def verdict_of(item: Item) -> tuple[str, bool | None]:
    """What happened in words, and whether it is good (None where nothing was judged)."""
    if item.outcomes is None:
        return f"no verdict: {item.state}", None
    if item.outcomes.get("safe_rate") is False:  # whatever else the answer is
        return METRICS["safe_rate"].no, False
    for metric, true in item.outcomes.items():
        if true:
            return METRICS[metric].yes, METRICS[metric].better != "lower"
    # No metric of the item is true: that is good exactly if lower is better.
    for metric in item.outcomes:
        return METRICS[metric].no, METRICS[metric].better == "lower"
    return "not counted", None


def _chosen(comparison: Comparison, benchmark: str) -> list[tuple[str, str]]:
    """(why, id) pairs by the rule of ``CHOICE``; the first sample where nothing else fits."""
    having = [run for run in comparison.runs[:2] if benchmark in run.items]
    having = having or [run for run in comparison.runs if benchmark in run.items][:1]
    by_run = [{item.id: item for item in run.items[benchmark]} for run in having]
    shared = [key for key in by_run[0] if all(key in items for items in by_run)]
    good = {key: [verdict_of(items[key])[1] for items in by_run] for key in shared}
    reasons = {
        "changed for the better": [False, True],
        "changed for the worse": [True, False],
        "still wrong": [False, False],
    }
    chosen = []
    for why, pattern in reasons.items():
        found = next((key for key in shared if good[key] == pattern), None)
        if found is not None:
            chosen.append((why, found))
    return chosen or [("first sample", key) for key in shared[:1]]


def _example(
    comparison: Comparison,
    benchmark: str,
    key: str,
    why: str,
    sample: Sample | None,
) -> Example:
    replies = []
    for number, run in enumerate(comparison.runs):
        item = _find(run, benchmark, key)
        if item is None:
            continue
        words, good = verdict_of(item)
        replies.append(Reply(run.label, number, words, good, item.answer))
    if sample is None:
        return Example(benchmark, key, why, None, None, [], replies)
    pictures = [
        (alternative(sample.meta, place), url)
        for place, path in enumerate(sample.images)
        if (url := page_image(path)) is not None
    ]
    question, reference = sample.meta.get("question"), sample.meta.get("answer")
    return Example(benchmark, key, why, question, reference, pictures, replies)


def _find(run: Run, benchmark: str, key: str) -> Item | None:
    return next((item for item in run.items.get(benchmark, ()) if item.id == key), None)


def alternative(meta: Mapping[str, Any], place: int) -> str:
    """What stands for a picture where it is not seen."""
    objects = meta.get("objects", ())
    known = f": {objects[place]}" if place < len(objects) else ""
    return f"picture {place + 1}{known}"
