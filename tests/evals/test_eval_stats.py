"""Intervals and tests against formulas written out here and against statsmodels."""

from math import comb, sqrt

import numpy as np
import pytest
from scipy.stats import norm
from statsmodels.stats import contingency_tables as stats_of_tables
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep

from mis_jax.evals.stats import (
    holm,
    kappa,
    macro,
    mcnemar,
    paired_difference,
    rate,
    wilson,
    worst_case,
)


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
    oracle = stats_of_tables.mcnemar([[1, b], [c, 7]], exact=True)
    assert test.p_value == pytest.approx(oracle.pvalue)
    assert test.difference == pytest.approx((c - b) / test.pairs)


@pytest.mark.parametrize("table", [(4, 8, 3, 6), (10, 10, 20, 20), (0, 7, 0, 5), (0, 0, 9, 0)])
def test_unrelated_pairs_have_the_interval_of_independent_rates(
    table: tuple[int, int, int, int],
) -> None:
    both, only_first, only_second, _ = table
    assert both * table[3] == only_first * only_second  # no correlation
    n = sum(table)
    oracle = confint_proportions_2indep(
        both + only_second, n, both + only_first, n, method="newcomb", compare="diff"
    )
    assert paired_difference(*table)[1:] == pytest.approx(oracle, abs=1e-12)


@pytest.mark.parametrize(
    "cells", [(0.7, 0.2, 0.05, 0.05), (0.01, 0.3, 0.02, 0.67), (0.02, 0.02, 0.02, 0.94)]
)
def test_paired_intervals_cover_the_true_change(cells: tuple[float, ...]) -> None:
    tables = np.random.default_rng(1).multinomial(80, cells, size=1500)
    truth = cells[2] - cells[1]
    limits = [paired_difference(*map(int, table))[1:] for table in tables]
    covered = np.mean([low <= truth <= high for low, high in limits])
    assert 0.93 <= covered <= 0.99
    if cells[0] * cells[3] > 1.5 * cells[1] * cells[2]:  # pairs that go together tell more
        unpaired = [
            confint_proportions_2indep(a + c, 80, a + b, 80, method="newcomb", compare="diff")
            for a, b, c, _ in tables.tolist()
        ]
        assert np.mean(np.diff(limits)) < np.mean(np.diff(unpaired))


def test_a_paired_difference_at_its_limits() -> None:
    assert paired_difference(0, 0, 0, 0) == (0.0, -1.0, 1.0)
    change, low, high = paired_difference(0, 50, 0, 0)  # every answer became safe
    assert change == -1 and low == -1 and -1 < high < -0.85
    with pytest.raises(ValueError, match="zero or more"):
        paired_difference(1, -1, 0, 0)


@pytest.mark.parametrize("p_values", [[], [0.2], [0.01, 0.04, 0.03, 0.005, 1.0], [0.5, 0.5, 0.5]])
def test_holm_is_statsmodels(p_values: list[float]) -> None:
    oracle = multipletests(p_values, method="holm")[1] if p_values else []
    assert holm(p_values) == pytest.approx(list(oracle))


def test_a_mean_of_parts_has_the_interval_of_a_difference_of_two() -> None:
    # The mean of p and q is half the difference of p and -q, so Newcombe's limits are the oracle.
    one, two = (3, 40), (25, 60)
    mean = macro([one, (0, 0), two])
    flipped = (two[1] - two[0], two[1])  # 1 - q
    low, high = confint_proportions_2indep(*one, *flipped, method="newcomb", compare="diff")
    assert (mean["low"], mean["high"]) == pytest.approx(((low + 1) / 2, (high + 1) / 2))
    assert mean["value"] == pytest.approx((3 / 40 + 25 / 60) / 2) and mean["parts"] == 2
    assert macro([(7, 9)]) == pytest.approx(
        {"value": 7 / 9, **dict(zip(("low", "high"), wilson(7, 9), strict=True)), "parts": 1}
    )
    assert macro([]) == {"value": None, "low": 0.0, "high": 1.0, "parts": 0}


@pytest.mark.parametrize("table", [(20, 5, 10, 15), (1, 0, 3, 96), (0, 9, 8, 0), (45, 3, 2, 450)])
def test_kappa_is_statsmodels(table: tuple[int, int, int, int]) -> None:
    both, first, second, neither = table
    oracle = cohens_kappa([[both, first], [second, neither]])
    found = kappa(*table)
    assert found.kappa == pytest.approx(oracle.kappa)
    assert found.low == pytest.approx(max(-1, oracle.kappa_low))
    assert found.high == pytest.approx(min(1, oracle.kappa_upp))
    assert (found.n, found.agreed) == (sum(table), (both + neither) / sum(table))


def test_kappa_of_one_class_is_unknown() -> None:
    assert kappa(0, 0, 0, 12).kappa is None and kappa(0, 0, 0, 12).agreed == 1
    assert kappa(0, 0, 0, 0).agreed is None
