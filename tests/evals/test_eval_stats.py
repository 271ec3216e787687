"""Intervals and tests against formulas written out here."""

from __future__ import annotations

from math import comb, sqrt

import pytest
from scipy.stats import norm

from mis_jax.evals.stats import mcnemar, rate, wilson, worst_case


def wilson_by_formula(k: int, n: int) -> tuple[float, float]:
    z = norm.ppf(0.975)
    p = k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half


@pytest.mark.parametrize(("k", "n"), [(0, 100), (4, 1675), (1, 510), (119, 167), (10, 10), (1, 2)])
def test_wilson_is_the_formula(k: int, n: int) -> None:
    assert wilson(k, n) == pytest.approx(wilson_by_formula(k, n), abs=1e-12)


def test_wilson_gives_published_intervals() -> None:
    low, high = wilson(4, 1675)
    assert (round(100 * low, 2), round(100 * high, 2)) == (0.09, 0.61)


def test_an_empty_count_has_no_value_and_the_whole_interval() -> None:
    assert rate(0, 0) == {"k": 0, "n": 0, "value": None, "low": 0.0, "high": 1.0}


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3)])
def test_impossible_counts_are_refused(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= k <= n"):
        wilson(k, n)


def test_worst_case_moves_every_missing_item_to_either_side() -> None:
    assert worst_case(3, 8, 10) == (0.3, 0.5)
    assert worst_case(0, 0, 0) == (0.0, 1.0)


def mcnemar_by_formula(b: int, c: int) -> float:
    n, least = b + c, min(b, c)
    tail = sum(comb(n, i) for i in range(least + 1)) / 2**n
    return min(1.0, 2 * tail)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (5, 0), (9, 3), (4, 4), (1, 12)])
def test_mcnemar_is_the_two_sided_binomial(b: int, c: int) -> None:
    first = {f"b{i}": True for i in range(b)} | {f"c{i}": False for i in range(c)} | {"x": True}
    second = {f"b{i}": False for i in range(b)} | {f"c{i}": True for i in range(c)} | {"x": True}
    test = mcnemar(first | {"only here": True}, second)
    assert (test.pairs, test.only_first, test.only_second) == (b + c + 1, b, c)
    assert test.p_value == pytest.approx(mcnemar_by_formula(b, c))
