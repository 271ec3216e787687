"""How far a judge agrees with itself: some answers judged once more, beside their verdicts.

A second verdict never changes a metric. It tells how much of a rate is the judge's own chance,
and nothing of whether the judge is right: for that see ``report/gold.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mis_jax.evals.stats import kappa, rate
from mis_jax.evals.types import Item


def drawn(answer_hashes: Mapping[str, str], count: int) -> list[str]:
    """The ids of ``count`` answers, drawn by their hashes.

    The draw says nothing of what the answers are like, is the same every time, and a larger one
    holds the smaller: so it can be resumed and enlarged.
    """
    return sorted(answer_hashes, key=lambda key: (answer_hashes[key], key))[:count]


def self_agreement(items: Sequence[Item], metrics: Sequence[str]) -> dict[str, Any] | None:
    """First and second verdicts compared, for ``results.json``; None where nothing was rechecked.

    ``counts`` are the states of the second verdicts; only labels can be compared. ``labels`` is
    the rate at which all labels are the same. Under each metric stand the rate at which the two
    verdicts count alike, the two-by-two table, and Cohen's kappa with its interval.
    """
    again = [item.again for item in items if item.again is not None]
    if not again:
        return None
    states = {
        state: sum(one.state == state for one in again)
        for state in ("ok", "unparsed", "refused", "error")
    }
    both = [(item, item.again) for item in items if item.again and item.again.labels is not None]
    same = sum(item.labels == second.labels for item, second in both)
    return {
        "n": len(again),
        "counts": states,
        "labels": rate(same, len(both)),
        "metrics": {
            metric: _of_votes(
                [
                    (item.outcomes[metric], second.outcomes[metric])
                    for item, second in both
                    if item.outcomes and second.outcomes
                    if metric in item.outcomes and metric in second.outcomes
                ]
            )
            for metric in metrics
        },
    }


def _of_votes(votes: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    cells = {
        "both": votes.count((True, True)),
        "only_first": votes.count((True, False)),
        "only_second": votes.count((False, True)),
        "neither": votes.count((False, False)),
    }
    beside = asdict(kappa(**cells))
    agreed = rate(cells["both"] + cells["neither"], len(votes))
    return {"agreed": agreed, **cells, "kappa": {k: beside[v] for k, v in _KAPPA.items()}}


_KAPPA = {"value": "kappa", "low": "low", "high": "high"}
