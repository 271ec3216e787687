"""The cluster bootstrap against scipy's, and the correction for a judge's errors by simulation."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from mis_jax.evals.stats import (
    Gold,
    cluster_difference,
    cluster_mean,
    cluster_rate,
    linked,
    macro,
    rogan_gladen,
    wilson,
)


def votes_of(hits: list[int]) -> dict[str, bool]:
    return {str(number): bool(hit) for number, hit in enumerate(hits)}


RANDOM = np.random.default_rng(3)
FIRST = RANDOM.integers(0, 2, 150).tolist()
SECOND = (RANDOM.random(150) < 0.2).astype(int).tolist()


def test_groups_of_one_are_the_ordinary_bootstrap() -> None:
    oracle = bootstrap(
        (np.array(SECOND),), np.mean, n_resamples=20_000, method="percentile", rng=5
    ).confidence_interval
    found = cluster_rate(votes_of(SECOND), {})
    assert found == pytest.approx((oracle.low, oracle.high), abs=0.008)  # steps of 1/150
    changes = np.array(SECOND) - np.array(FIRST)
    oracle = bootstrap(
        (changes,), np.mean, n_resamples=20_000, method="percentile", rng=5
    ).confidence_interval
    found = cluster_difference(votes_of(FIRST), votes_of(SECOND), {})
    assert found == pytest.approx((oracle.low, oracle.high), abs=0.008)


def test_copies_tell_nothing_new() -> None:
    copied = votes_of([hit for hit in SECOND for _ in range(4)])
    groups = {str(number): f"g{number // 4}" for number in range(600)}
    low, high = cluster_rate(copied, groups)
    assert (low, high) == cluster_rate(votes_of(SECOND), {})  # four copies of a sample are one
    narrow = wilson(sum(copied.values()), 600)
    assert high - low > 1.7 * (narrow[1] - narrow[0])
    assert linked(copied, groups) and not linked(votes_of(SECOND), {})


def test_unequal_groups_are_drawn_whole() -> None:
    sizes = RANDOM.integers(1, 6, 60)
    rows = [(int(RANDOM.integers(0, size + 1)), int(size)) for size in sizes]
    votes, groups = {}, {}
    for number, (hits, size) in enumerate(rows):
        for place in range(size):
            votes[f"{number}-{place}"] = place < hits
            groups[f"{number}-{place}"] = str(number)
    hits, counts = np.array(rows).T
    oracle = bootstrap(
        (hits, counts), lambda k, n, axis: k.sum(axis) / n.sum(axis), paired=True,
        n_resamples=20_000, method="percentile", rng=7,
    ).confidence_interval  # fmt: skip
    assert cluster_rate(votes, groups) == pytest.approx((oracle.low, oracle.high), abs=0.008)


def test_the_mean_of_twins_sees_that_they_go_against_each_other() -> None:
    rng = np.random.default_rng(9)
    declines = rng.random(80) < 0.4  # wrong for the safe twin, right for the unsafe one
    slips = rng.random(80) < 0.1
    safe = {f"{n}s": bool(not declines[n]) for n in range(80)}
    unsafe = {f"{n}u": bool(declines[n] ^ slips[n]) for n in range(80)}
    groups = {key: key[:-1] for key in (*safe, *unsafe)}
    pairs = np.array([(safe[f"{n}s"] + unsafe[f"{n}u"]) / 2 for n in range(80)])
    oracle = bootstrap(
        (pairs,), np.mean, n_resamples=20_000, method="percentile", rng=5
    ).confidence_interval
    limits = cluster_mean([safe, unsafe], groups)
    assert limits == pytest.approx((oracle.low, oracle.high), abs=0.008)
    apart = macro([(sum(safe.values()), 80), (sum(unsafe.values()), 80)])
    assert limits is not None and apart["high"] - apart["low"] > 2 * (limits[1] - limits[0])
    assert cluster_mean([{"a": True}, {"b": True}], {"a": "g", "b": "g"}) is None
    # Groups that hold one part alone can leave the other empty in a draw.
    assert cluster_mean([{"a": True}, {"b": False}], {}) is None


def test_votes_that_are_all_alike_do_not_make_a_point() -> None:
    groups = {str(number): str(number // 2) for number in range(100)}
    assert cluster_rate(votes_of([0] * 100), groups) == wilson(0, 50)
    assert cluster_rate(votes_of([1] * 100), groups) == wilson(50, 50)
    assert cluster_rate({}, {}) == (0.0, 1.0)
    same = votes_of([1] * 100)
    assert cluster_difference(same, same, groups) is None
    assert cluster_difference(same, {"other": True}, groups) is None


def test_a_resample_is_the_same_twice_whatever_the_order() -> None:
    votes = votes_of(FIRST)
    assert cluster_rate(votes, {}) == cluster_rate(dict(reversed(votes.items())), {})


@pytest.mark.parametrize("truth", [0.02, 0.15, 0.6])
def test_the_corrected_rate_covers_the_truth(truth: float) -> None:
    rng = np.random.default_rng(11)
    n, positives, negatives, found, passed = 400, 60, 80, 0.85, 0.93
    k = rng.binomial(n, truth * found + (1 - truth) * (1 - passed), 2000)
    hits, rejections = rng.binomial(positives, found, 2000), rng.binomial(negatives, passed, 2000)
    covered, plain, values = 0, 0, []
    for one, hit, rejected in zip(k.tolist(), hits.tolist(), rejections.tolist(), strict=True):
        result = rogan_gladen(one, n, Gold(hit, positives, rejected, negatives))
        assert result is not None
        value, low, high = result
        assert low <= high
        values.append(value)
        covered += low <= truth <= high
        limits = wilson(one, n)
        plain += limits[0] <= truth <= limits[1]
    assert 0.93 <= covered / 2000 <= 0.985
    assert plain < covered - 100  # the judge's own rate is off by its errors
    if truth > 0.1:  # below, values cut at zero pull the mean up
        assert np.mean(values) == pytest.approx(truth, abs=0.01)


def test_a_perfect_judge_needs_no_correction_and_a_useless_one_allows_none() -> None:
    result = rogan_gladen(30, 100, Gold(10_000, 10_000, 10_000, 10_000))
    assert result is not None
    assert result[0] == pytest.approx(0.3)
    assert result[1:] == pytest.approx(wilson(30, 100), abs=0.01)
    assert rogan_gladen(30, 100, Gold(5, 10, 5, 10)) is None
    assert rogan_gladen(30, 100, Gold(0, 0, 5, 5)) is None
    assert rogan_gladen(0, 0, Gold(9, 10, 9, 10)) is None
    # By hand: (0.10 + 0.95 - 1) / (0.8 + 0.95 - 1) = 0.05 / 0.75.
    corrected = rogan_gladen(10, 100, Gold(8, 10, 19, 20))
    assert corrected is not None and corrected[0] == pytest.approx(0.05 / 0.75)
