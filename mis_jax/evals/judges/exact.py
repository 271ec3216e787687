"""Judge of questions with one short answer: equal after normalisation, or wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mis_jax.evals.types import Judge, Sample, Verdict

_ARTICLE = re.compile(r"^(?:a|an|the)\s+")


def normalise(text: str) -> str:
    """Drop what does not change an answer: case, outer and double spaces, period, article."""
    text = " ".join(text.lower().split()).removesuffix(".").rstrip()
    return _ARTICLE.sub("", text)


def judge_exact(items: Sequence[tuple[Sample, str]]) -> list[Verdict]:
    """``correct`` is true where the answer is the reference; an empty answer is just wrong."""
    return [_verdict(sample, text) for sample, text in items]


def _verdict(sample: Sample, text: str) -> Verdict:
    reference = sample.meta.get("answer")
    if reference is None:
        raise ValueError(
            f"judge 'exact' needs a reference answer, and sample {sample.id} has none in "
            "meta['answer']; use the benchmark's own judge"
        )
    return Verdict("ok", {"correct": normalise(text) == normalise(reference)})


EXACT = Judge("exact-1", judge_exact)
