"""Intervals, tests and corrections for counted answers."""

from mis_jax.evals.stats.agreement import Agreement, kappa
from mis_jax.evals.stats.clusters import cluster_difference, cluster_mean, cluster_rate, linked
from mis_jax.evals.stats.corrections import Gold, holm, rogan_gladen
from mis_jax.evals.stats.intervals import macro, rate, wilson, worst_case
from mis_jax.evals.stats.paired import PairedTest, mcnemar, paired_difference

__all__ = [
    "Agreement",
    "Gold",
    "PairedTest",
    "cluster_difference",
    "cluster_mean",
    "cluster_rate",
    "holm",
    "kappa",
    "linked",
    "macro",
    "mcnemar",
    "paired_difference",
    "rate",
    "rogan_gladen",
    "wilson",
    "worst_case",
]
