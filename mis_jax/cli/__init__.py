"""The console script `mis-jax`: each verb parses, calls one function, prints."""

from mis_jax.cli.main import VERBS, main

__all__ = ["VERBS", "main"]
