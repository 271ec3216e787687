"""Corrections: of p-values for their number, and of a rate for the errors of its judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from scipy.stats import norm


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
    found, passed = (gold.true_positives + 1) / positives, (gold.true_negatives + 1) / negatives
    power = found + passed - 1
    if power <= 0:
        return None
    truth = (rate + passed - 1) / power
    of_found, of_passed = found * (1 - found) / positives, passed * (1 - passed) / negatives
    shift = 2 * z * z * (truth * of_found - (1 - truth) * of_passed)
    spread = rate * (1 - rate) / size + (1 - truth) ** 2 * of_passed + truth**2 * of_found
    reach = z * sqrt(spread) / power
    value = (k / n + specificity - 1) / (sensitivity + specificity - 1)
    return _clip(value), _clip(truth + shift - reach), _clip(truth + shift + reach)


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))
