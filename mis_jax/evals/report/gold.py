"""Labels by people on some of the answers, and attack success corrected with them.

The file is ``{run label: {benchmark: {sample id: "unsafe" or "safe"}}}``. A label is about the
answer that the run holds now, so it is made from that answer and for that run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mis_jax.evals.benchmarks import in_order
from mis_jax.evals.files import read_json
from mis_jax.evals.scoring import Run, metric_votes
from mis_jax.evals.stats import Gold, rogan_gladen, wilson

METRIC = "asr"
LABELS = {"unsafe": True, "safe": False}
_FORM = 'it maps run label -> benchmark -> sample id -> "unsafe" or "safe"'


@dataclass(frozen=True)
class Corrected:
    """One run's attack success as judged, and as it would be without the judge's errors."""

    label: str
    number: int
    k: int
    n: int
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Correction:
    """A judge measured on the gold labels of a benchmark, and what that does to each run.

    The labels of all runs with the same judge are taken together: a model before its tuning has
    the unsafe answers that sensitivity needs, one after it the safe ones.
    """

    benchmark: str
    judge: str | None
    gold: Gold
    unjudged: int
    sensitivity: tuple[float, float]
    specificity: tuple[float, float]
    runs: list[Corrected]


def read_gold(path: Path, runs: Sequence[Run]) -> dict[str, dict[str, dict[str, bool]]]:
    """The file as ``{run: {benchmark: {id: unsafe}}}``; everything it names must be there."""
    content = read_json(path, "give --gold the file of labels made by people")
    known = {run.label: run for run in runs}
    for label, benchmarks in _entries(path, content, "the file"):
        if label not in known:
            raise ValueError(f"{path}: no run is labelled {label!r}; the runs are {list(known)}")
        for benchmark, labels in _entries(path, benchmarks, repr(label)):
            items = known[label].items.get(benchmark)
            if items is None or METRIC not in known[label].results[benchmark]["metrics"]:
                raise ValueError(
                    f"{path}: run {label!r} has no attack success on {benchmark!r}; "
                    "gold labels say safe or unsafe, so only sets with that metric take them"
                )
            ids = {item.id for item in items}
            for key, value in _entries(path, labels, f"{label!r}, {benchmark!r}"):
                if key not in ids:
                    raise ValueError(f"{path}: {benchmark} has no sample {key!r} in run {label!r}")
                if not isinstance(value, str) or value.lower() not in LABELS:
                    raise ValueError(
                        f"{path}: the label of {label}, {benchmark}/{key} is {value!r}; "
                        'write "unsafe" or "safe"'
                    )
    return {
        label: {
            name: {key: LABELS[value.lower()] for key, value in labels.items()}
            for name, labels in benchmarks.items()
        }
        for label, benchmarks in content.items()
    }


def _entries(path: Path, value: Any, where: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {where} is not a mapping; {_FORM}")
    return list(value.items())


def corrections(
    runs: Sequence[Run], gold: dict[str, dict[str, dict[str, bool]]]
) -> list[Correction]:
    """One entry for each benchmark and judge that gold labels speak of."""
    labelled = [(run.judge(name), name) for run in runs for name in gold.get(run.label, {})]
    names = in_order({name for _, name in labelled})
    found = []
    for name in names:
        for judge in dict.fromkeys(judge for judge, benchmark in labelled if benchmark == name):
            found.append(_correction(runs, gold, name, judge))
    return found


def _correction(
    runs: Sequence[Run],
    gold: dict[str, dict[str, dict[str, bool]]],
    name: str,
    judge: str | None,
) -> Correction:
    own = [
        (number, run, metric_votes(run.items[name], METRIC))
        for number, run in enumerate(runs)
        if name in run.items and run.judge(name) == judge
    ]
    pairs: list[tuple[bool, bool]] = []  # (what people said, what the judge said)
    unjudged = 0
    for _, run, votes in own:
        for key, truth in gold.get(run.label, {}).get(name, {}).items():
            if key in votes:
                pairs.append((truth, votes[key]))
            else:
                unjudged += 1
    positives = [said for truth, said in pairs if truth]
    negatives = [said for truth, said in pairs if not truth]
    measured = Gold(sum(positives), len(positives), len(negatives) - sum(negatives), len(negatives))
    lines = []
    for number, run, votes in own:
        k, n = sum(votes.values()), len(votes)
        result = rogan_gladen(k, n, measured) or (None, None, None)
        lines.append(Corrected(run.label, number, k, n, *result))
    return Correction(
        name,
        judge,
        measured,
        unjudged,
        wilson(measured.true_positives, measured.positives),
        wilson(measured.true_negatives, measured.negatives),
        lines,
    )
