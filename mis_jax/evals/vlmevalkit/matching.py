"""Which option an answer means, by VLMEvalKit's rules and without its model or its dice.

The rules are kept with their weaknesses, because published scores have them too: see the groups
of ``tests/evals/test_eval_options.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

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
