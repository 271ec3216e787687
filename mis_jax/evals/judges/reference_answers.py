"""Judges of answers with a known reference: equal to it, or the option that it names.

`exact` is for one short answer: equal after normalisation, or wrong.

`options` finds the option that an answer means by VLMEvalKit's rules, without its model or its
dice. The rules are kept with their weaknesses, because published scores have them too: see the
groups of `tests/evals/test_eval_options.py`. Where they cannot tell, VLMEvalKit asks a model and
then guesses; here the answer is `unparsed`. An open question is right where the answer contains
the reference: it becomes a choice between the reference and everything else, and what is not the
reference is wrong. Only an answer too long for the rules to look for the reference is `unparsed`
there.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mis_jax.evals.types import Judge, Sample, Verdict
from mis_jax.evals.vlmevalkit.questions import LETTERS

_ARTICLE = re.compile(r"^(?:a|an|the)\s+")


def normalise(text: str) -> str:
    """Drop what does not change an answer: case, outer and double spaces, period, article."""
    text = " ".join(text.lower().split()).removesuffix(".").rstrip()
    return _ARTICLE.sub("", text)


def judge_exact(items: Sequence[tuple[Sample, str]]) -> list[Verdict]:
    """`correct` is true where the answer is the reference; an empty answer is just wrong."""
    return [_exact_verdict(sample, text) for sample, text in items]


def _exact_verdict(sample: Sample, text: str) -> Verdict:
    reference = sample.meta.get("answer")
    if reference is None:
        raise ValueError(
            f"judge 'exact' needs a reference answer, and sample {sample.id} has none in "
            "meta['answer']; use the benchmark's own judge"
        )
    return Verdict("ok", {"correct": normalise(text) == normalise(reference)})


EXACT = Judge("exact-1", judge_exact, ("answer",))


NONE_OF_THEM = "Z"
"""What the rules call an answer that chooses nothing: decided, and right for no question."""

LAST_WORDS = 4
"""A letter counts only where it first stands among so many words at the end."""

FAILED = "Failed to obtain answer via API"
DECLINED = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# No end of a word is asked for after the letter, and its case does not matter.
_STATED = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)

Rule = Literal["letter", "sentence", "text", "declined"]


@dataclass(frozen=True)
class Match:
    """The option that was understood and the rule that understood it."""

    option: str
    rule: Rule


def infer(answer: str, options: Mapping[str, str]) -> Match | None:
    """The option that an answer means; None where the rules cannot tell."""
    return infer_letter(answer, options) or infer_text(answer, options)


def infer_letter(answer: str, options: Mapping[str, str]) -> Match | None:
    """By a letter that stands alone, or that follows "answer is"."""
    if FAILED in answer:
        return None
    if any(phrase in answer for phrase in DECLINED):
        return Match(NONE_OF_THEM, "declined")
    words = answer.translate(_PUNCTUATION).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - LAST_WORDS:
        return Match(named[0], "letter")
    if not named and NONE_OF_THEM in words:
        return Match(NONE_OF_THEM, "letter")
    stated = _STATED.search(answer)
    if stated and (letter := stated[1].upper()) in options:
        return Match(letter, "sentence")
    return None


def too_long(answer: str, options: Mapping[str, str]) -> bool:
    """Whether an answer has more than twice the length of all options: no text is looked for."""
    return len(answer.lower()) > 2 * sum(len(text) for text in options.values())


def infer_text(answer: str, options: Mapping[str, str]) -> Match | None:
    """By the words of the only option that the answer contains."""
    if too_long(answer, options):
        return None
    lowered = answer.lower()
    contained = [letter for letter, text in options.items() if text.lower() in lowered]
    return Match(contained[0], "text") if len(contained) == 1 else None


OTHER_ANSWERS = "Other Answers"


def judge_options(items: Sequence[tuple[Sample, str]]) -> list[Verdict]:
    """`correct`, the `option` understood and the `rule` that understood it."""
    return [_option_verdict(sample, text.strip()) for sample, text in items]


def _option_verdict(sample: Sample, text: str) -> Verdict:
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


OPTIONS = Judge("vlmevalkit-options-1", judge_options, ("answer", "options"))
