"""Intervals and tests for counted answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scipy.stats import binomtest


def wilson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of ``k`` successes in ``n`` trials.

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
    """A metric as ``results.json`` holds it; the value of an empty count is null, not zero."""
    low, high = wilson(k, n)
    return {"k": k, "n": n, "value": k / n if n else None, "low": low, "high": high}


def worst_case(k: int, n: int, total: int) -> tuple[float, float]:
    """Bounds of a rate if every item that was not judged had gone one way or the other."""
    if not 0 <= k <= n <= total:
        raise ValueError(f"bounds need 0 <= k <= n <= total, got k={k}, n={n}, total={total}")
    if total == 0:
        return 0.0, 1.0
    return k / total, (k + total - n) / total


@dataclass(frozen=True)
class PairedTest:
    """McNemar's exact test over the items that two runs share."""

    pairs: int
    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Mapping[str, bool], second: Mapping[str, bool]) -> PairedTest:
    """Compare two runs on the same sample ids.

    Only items on which the runs differ carry information: under the null hypothesis each of them
    is as likely to differ one way as the other, which is a binomial test with one half.
    """
    shared = first.keys() & second.keys()
    only_first = sum(first[key] and not second[key] for key in shared)
    only_second = sum(second[key] and not first[key] for key in shared)
    differing = only_first + only_second
    p_value = float(binomtest(only_first, differing, 0.5).pvalue) if differing else 1.0
    return PairedTest(len(shared), only_first, only_second, p_value)
