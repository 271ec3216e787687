"""The built-in judges by the name that `--judge` takes.

A language model behind an endpoint is in `llm.py`, a local guard checkpoint in `llama_guard.py`.
"""

from mis_jax.evals.judges.reference_answers import EXACT, OPTIONS
from mis_jax.evals.judges.rules import RULES
from mis_jax.evals.types import Judge

JUDGES: dict[str, Judge] = {"rules": RULES, "exact": EXACT, "options": OPTIONS}


def get_judge(name: str) -> Judge:
    """A built-in judge by name, or a `ValueError` that lists the known ones."""
    if name not in JUDGES:
        raise ValueError(
            f"judge {name!r} is unknown; --judge takes {', '.join(JUDGES)}, none, "
            "http://host/v1 or the folder of a guard checkpoint"
        )
    return JUDGES[name]
