"""Intervals of rates: of one, and of a mean of several."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
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


def macro(counts: Sequence[tuple[int, int]], confidence: float = 0.95) -> dict[str, Any]:
    """The plain mean of several rates, each of a part with its own (k, n).

    The interval combines the Wilson limits of the parts by squares and sums, as Newcombe's does
    for a difference (Zou and Donner's MOVER). It stays open where a normal approximation would
    be a point. Parts without any count are left out, and ``parts`` says how many remain.
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
