"""Intervals, tests and corrections for counted answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, sqrt
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm


def wilson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of `k` successes in `n` trials.

    Wilson rather than the normal approximation, because safety rates sit near 0 and 1 where the
    latter collapses to a point. With no trials nothing is known, hence the whole range.
    """
    if not 0 <= k <= n:
        raise ValueError(f"an interval needs 0 <= k <= n, got k={k}, n={n}")
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(k, n).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


def rate(k: int, n: int) -> dict[str, Any]:
    """A metric as `results.json` holds it; the value of an empty count is null, not zero."""
    low, high = wilson(k, n)
    return {"k": k, "n": n, "value": k / n if n else None, "low": low, "high": high}


def worst_case(k: int, n: int, total: int) -> tuple[float, float]:
    """Bounds of a rate if every item that was not judged had gone one way or the other."""
    if not 0 <= k <= n <= total:
        raise ValueError(f"bounds need 0 <= k <= n <= total, got k={k}, n={n}, total={total}")
    if total == 0:
        return 0.0, 1.0
    return k / total, (k + total - n) / total


def macro(counts: Sequence[tuple[int, int]], confidence: float = 0.95) -> dict[str, Any]:
    """The plain mean of several rates, each of a part with its own (k, n).

    The interval combines the Wilson limits of the parts by squares and sums, as Newcombe's does
    for a difference (Zou and Donner's MOVER). It stays open where a normal approximation would
    be a point. Parts without any count are left out, and `parts` says how many remain.
    """
    counts = [(k, n) for k, n in counts if n]
    if not counts:
        return {"value": None, "low": 0.0, "high": 1.0, "parts": 0}
    rates = [k / n for k, n in counts]
    limits = [wilson(k, n, confidence) for k, n in counts]
    size = len(counts)
    value = sum(rates) / size
    below = hypot(*(p - low for p, (low, _) in zip(rates, limits, strict=True))) / size
    above = hypot(*(high - p for p, (_, high) in zip(rates, limits, strict=True))) / size
    return {"value": value, "low": value - below, "high": value + above, "parts": size}


@dataclass(frozen=True)
class PairedTest:
    """McNemar's exact test over the items that two runs share, and the change between them."""

    pairs: int
    only_first: int
    only_second: int
    p_value: float
    difference: float
    """The second run's rate minus the first's, over the shared items alone."""
    low: float
    high: float

    @property
    def differing(self) -> int:
        """On how many items the runs differ; the others tell the test nothing."""
        return self.only_first + self.only_second


def mcnemar(first: Mapping[str, bool], second: Mapping[str, bool]) -> PairedTest:
    """Compare two runs on the same sample ids.

    Only items on which the runs differ carry information: under the null hypothesis each of them
    is as likely to differ one way as the other, which is a binomial test with one half.
    """
    shared = first.keys() & second.keys()
    both = sum(first[key] and second[key] for key in shared)
    only_first = sum(first[key] and not second[key] for key in shared)
    only_second = sum(second[key] and not first[key] for key in shared)
    differing = only_first + only_second
    p_value = float(binomtest(only_first, differing, 0.5).pvalue) if differing else 1.0
    neither = len(shared) - both - differing
    change = paired_difference(both, only_first, only_second, neither)
    return PairedTest(len(shared), only_first, only_second, p_value, *change)


def paired_difference(
    both: int, only_first: int, only_second: int, neither: int, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Second rate minus first over the same items, with Newcombe's interval for paired rates.

    It is the hybrid score interval of his 1998 paper (method 10): the two Wilson intervals,
    combined with the correlation of the pairs, corrected for continuity where that is positive.
    With no pairs nothing is known, hence the whole range.
    """
    n = both + only_first + only_second + neither
    if min(both, only_first, only_second, neither) < 0:
        raise ValueError("a paired difference needs four counts of zero or more")
    if n == 0:
        return 0.0, -1.0, 1.0
    k1, k2 = both + only_first, both + only_second
    p1, p2 = k1 / n, k2 / n
    low1, high1 = wilson(k1, n, confidence)
    low2, high2 = wilson(k2, n, confidence)
    excess = both * neither - only_first * only_second
    if excess > 0:
        excess = max(excess - n / 2, 0)
    scale = k1 * (n - k1) * k2 * (n - k2)
    correlation = excess / sqrt(scale) if scale else 0.0

    def reach(one: float, two: float) -> float:
        return sqrt(max(one * one - 2 * correlation * one * two + two * two, 0.0))

    change = p2 - p1
    return change, change - reach(p2 - low2, high1 - p1), change + reach(high2 - p2, p1 - low1)


RESAMPLES = 10_000
SEED = 20250131
"""Fixed, so that a report is the same bytes twice."""


def linked(votes: Mapping[str, bool], groups: Mapping[str, str]) -> bool:
    """Whether any two of the samples belong to one group; a sample without one is its own."""
    names = [groups.get(key, key) for key in votes]
    return len(set(names)) < len(names)


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


@dataclass(frozen=True)
class Agreement:
    """Cohen's kappa with its interval; None where chance alone would make them agree fully."""

    n: int
    agreed: float | None
    kappa: float | None
    low: float | None
    high: float | None


def kappa(
    both: int, only_first: int, only_second: int, neither: int, confidence: float = 0.95
) -> Agreement:
    """Cohen's kappa of two yes-or-no labellings of the same items, from their 2x2 table.

    The interval is the normal one with the variance of Fleiss, Cohen and Everitt, cut at -1 and 1.
    """
    n = both + only_first + only_second + neither
    if n == 0:
        return Agreement(0, None, None, None, None)
    cells = ((both / n, only_first / n), (only_second / n, neither / n))
    rows = [sum(row) for row in cells]
    columns = [cells[0][j] + cells[1][j] for j in (0, 1)]
    agreed = cells[0][0] + cells[1][1]
    chance = sum(row * column for row, column in zip(rows, columns, strict=True))
    if chance == 1:  # both always said the same one thing
        return Agreement(n, agreed, None, None, None)
    value = (agreed - chance) / (1 - chance)
    spread = sum(cells[i][i] * (1 - (rows[i] + columns[i]) * (1 - value)) ** 2 for i in (0, 1)) + (
        1 - value
    ) ** 2 * sum(cells[i][1 - i] * (columns[i] + rows[1 - i]) ** 2 for i in (0, 1))
    variance = (spread - (value - chance * (1 - value)) ** 2) / (n * (1 - chance) ** 2)
    reach = float(norm.ppf((1 + confidence) / 2)) * sqrt(max(variance, 0.0))
    return Agreement(n, agreed, value, max(-1.0, value - reach), min(1.0, value + reach))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given.

    They bound the chance of even one false finding among all tests, however those depend on
    each other.
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


@dataclass(frozen=True)
class Gold:
    """A judge beside people on the same answers; positive is what the rate counts (unsafe)."""

    true_positives: int
    positives: int
    true_negatives: int
    negatives: int

    @property
    def sensitivity(self) -> float | None:
        """Which share of the truly positive answers the judge found."""
        return self.true_positives / self.positives if self.positives else None

    @property
    def specificity(self) -> float | None:
        """Which share of the truly negative answers the judge let pass."""
        return self.true_negatives / self.negatives if self.negatives else None


def rogan_gladen(
    k: int, n: int, gold: Gold, confidence: float = 0.95
) -> tuple[float, float, float] | None:
    """A judge's rate corrected for its measured errors, with Lang and Reiczigel's interval.

    The value is Rogan and Gladen's (rate + specificity - 1) / (sensitivity + specificity - 1),
    kept within 0 and 1. The interval (Lang and Reiczigel, 2014) includes that sensitivity and
    specificity were themselves measured on few answers. None where a correction is impossible: no
    positives or no negatives in the gold labels, nothing judged, or a judge no better than chance.
    """
    sensitivity, specificity = gold.sensitivity, gold.specificity
    if sensitivity is None or specificity is None or n == 0 or sensitivity + specificity <= 1:
        return None
    z = float(norm.ppf((1 + confidence) / 2))
    # Each count gets pseudo-trials that are half successes, as Agresti and Coull's interval does.
    size = n + z * z
    rate = (k + z * z / 2) / size
    positives, negatives = gold.positives + 2, gold.negatives + 2
    se, sp = (gold.true_positives + 1) / positives, (gold.true_negatives + 1) / negatives
    power = se + sp - 1
    if power <= 0:
        return None
    truth = (rate + sp - 1) / power
    se_variance, sp_variance = se * (1 - se) / positives, sp * (1 - sp) / negatives
    shift = 2 * z * z * (truth * se_variance - (1 - truth) * sp_variance)
    spread = rate * (1 - rate) / size + (1 - truth) ** 2 * sp_variance + truth**2 * se_variance
    reach = z * sqrt(spread) / power
    value = (k / n + specificity - 1) / (sensitivity + specificity - 1)
    return _clip(value), _clip(truth + shift - reach), _clip(truth + shift + reach)


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))
