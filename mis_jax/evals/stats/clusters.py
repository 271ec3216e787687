"""Cluster bootstrap: intervals for samples that come in groups.

Twins over one picture, several wordings of one request or several pictures of one subject tell
less than as many unrelated samples. So whole groups are drawn, not samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mis_jax.evals.stats.intervals import wilson

RESAMPLES = 10_000
SEED = 20250131
"""Fixed, so that a report is the same bytes twice."""


def linked(votes: Mapping[str, bool], groups: Mapping[str, str]) -> bool:
    """Whether any two of the samples belong to one group; a sample without one is its own."""
    known = [groups.get(key, key) for key in votes]
    return len(set(known)) < len(known)


def cluster_rate(
    votes: Mapping[str, bool], groups: Mapping[str, str], confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of a rate, with whole groups drawn.

    Where all votes are alike every draw is too, and a bootstrap would claim to know the rate
    exactly. Then the groups count as one trial each in a Wilson interval, which is the widest
    that links within groups can make it.
    """
    rows = _by_group(votes, {key: int(vote) for key, vote in votes.items()}, groups)
    hits, sizes = rows.sum(0) if len(rows) else (0, 0)
    if hits in (0, sizes):
        return wilson(len(rows) if hits else 0, len(rows), confidence)
    return _interval(rows, _ratio, confidence)


def cluster_difference(
    first: Mapping[str, bool],
    second: Mapping[str, bool],
    groups: Mapping[str, str],
    confidence: float = 0.95,
) -> tuple[float, float] | None:
    """Percentile interval of second minus first over their shared samples; groups are drawn.

    None where no group differs from another, since a bootstrap cannot tell any spread there.
    """
    shared = first.keys() & second.keys()
    changes = {key: int(second[key]) - int(first[key]) for key in shared}
    rows = _by_group(changes, changes, groups)
    if not len(rows) or len(set((rows[:, 0] / rows[:, 1]).tolist())) == 1:
        return None
    return _interval(rows, _ratio, confidence)


def cluster_mean(
    parts: Sequence[Mapping[str, bool]], groups: Mapping[str, str], confidence: float = 0.95
) -> tuple[float, float] | None:
    """Percentile interval of the plain mean of several rates whose samples share groups.

    Such as the two halves of a set of twins: a model that declines everything gains on one what
    it loses on the other, and only drawing both together sees that. None where every group is
    alike, or where some draw leaves a part empty.
    """
    rows: dict[str, list[int]] = {}
    for place, votes in enumerate(parts):
        for key in sorted(votes):
            row = rows.setdefault(groups.get(key, key), [0] * (2 * len(parts)))
            row[2 * place] += votes[key]
            row[2 * place + 1] += 1
    table = np.array(list(rows.values()), np.int64).reshape(-1, 2 * len(parts))
    if len(np.unique(table, axis=0)) < 2:
        return None

    def mean(sums: np.ndarray) -> np.ndarray:
        return (sums[:, 0::2] / sums[:, 1::2]).mean(1)

    with np.errstate(invalid="ignore"):
        low, high = _interval(table, mean, confidence)
    return None if np.isnan(low) else (low, high)


def _by_group(
    keys: Mapping[str, object], values: Mapping[str, int], groups: Mapping[str, str]
) -> np.ndarray:
    """One row (sum of values, number of samples) for each group, in order of appearance."""
    rows: dict[str, list[int]] = {}
    for key in sorted(keys):  # the order of a set must not decide the draws
        row = rows.setdefault(groups.get(key, key), [0, 0])
        row[0] += values[key]
        row[1] += 1
    return np.array(list(rows.values()), np.int64).reshape(-1, 2)


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


def _interval(
    rows: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], confidence: float
) -> tuple[float, float]:
    """Percentiles of the statistic over sums of redrawn rows.

    Groups with equal rows are interchangeable, so it is enough to draw how often each kind of
    row comes up: the same distribution at a small part of the cost.
    """
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    total = int(counts.sum())
    draws = np.random.default_rng(SEED).multinomial(total, counts / total, size=RESAMPLES)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(statistic(draws @ kinds), [tail, 100 - tail])
    return float(low), float(high)
