"""How far two ways of labelling agree beyond chance."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from scipy.stats import norm


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
