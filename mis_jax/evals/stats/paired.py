"""Two runs over the same samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

from scipy.stats import binomtest

from mis_jax.evals.stats.intervals import wilson


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
