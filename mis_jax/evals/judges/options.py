"""Judge of multiple-choice questions: the option that an answer means, by VLMEvalKit's rules.

Where those rules cannot tell, VLMEvalKit asks a model and then guesses; here the answer is
``unparsed``. An open question is right where the answer contains the reference: it becomes a
choice between the reference and everything else, and what is not the reference is wrong. Only an
answer too long for the rules to look for the reference is ``unparsed`` there.
"""

from __future__ import annotations

from collections.abc import Sequence

from mis_jax.evals.types import Judge, Sample, Verdict
from mis_jax.evals.vlmevalkit.matching import infer, too_long
from mis_jax.evals.vlmevalkit.questions import LETTERS

OTHER_ANSWERS = "Other Answers"


def judge_options(items: Sequence[tuple[Sample, str]]) -> list[Verdict]:
    """``correct``, the ``option`` understood and the ``rule`` that understood it."""
    return [_verdict(sample, text.strip()) for sample, text in items]


def _verdict(sample: Sample, text: str) -> Verdict:
    reference, options = sample.meta.get("answer"), sample.meta.get("options")
    if reference is None or options is None:
        raise ValueError(
            f"judge 'options' needs meta['options'] and meta['answer'], and sample {sample.id} "
            "lacks one of them; use the benchmark's own judge"
        )
    open_question = not options
    if open_question:
        options = {"A": reference, "B": OTHER_ANSWERS}
        # VLMEvalKit takes a reference of one capital letter for an option's even here.
        reference = reference if len(reference) == 1 and reference in LETTERS else "A"
    match = infer(text, options)
    if match is not None:
        correct = match.option == reference
        return Verdict("ok", {"correct": correct, "option": match.option, "rule": match.rule})
    if open_question and not too_long(text, options):
        return Verdict("ok", {"correct": False, "option": None, "rule": "text"})
    return Verdict("unparsed", detail="no rule tells which option is meant")


OPTIONS = Judge("vlmevalkit-options-1", judge_options)
