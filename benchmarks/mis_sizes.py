"""Sizes of samples like those of MIRage's mixture, as no published file was at hand."""

import numpy as np


def mis_like(samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and tiles like those of MIRage's mixture (arXiv 2501.18533, section 3, appendix B).

    Of 4,427 samples 11.3 % are general ones. The others have two square pictures (a tile of 256
    tokens and two marks each), a question of 75 +- 15 tokens and a label of 130 to 160 words (200
    +- 35 tokens); the system turn and the roles take 45. General samples have none to six pictures
    that share a budget of six tiles, each with its thumbnail, and long-tailed texts (median 100).
    """
    rng = np.random.default_rng(seed)
    general = rng.random(samples) < 0.113
    question = rng.normal(75, 15, samples).clip(35, 160)
    label = rng.normal(200, 35, samples).clip(90, 330)
    images = np.where(general, rng.choice(7, samples, p=[0.05, 0.2, 0.35, 0.2, 0.1, 0.05, 0.05]), 2)
    budget = 6 // np.maximum(images, 1)
    grid = np.minimum(rng.choice([1, 2, 3, 4, 6], samples, p=[0.4, 0.2, 0.15, 0.15, 0.1]), budget)
    tiles = images * np.where(general, grid + (grid > 1), 1)
    text = np.where(general, rng.lognormal(4.6, 0.8, samples).clip(20, 1500), question + label)
    return (text + 45 + 256 * tiles + 2 * images).astype(np.int64), tiles
