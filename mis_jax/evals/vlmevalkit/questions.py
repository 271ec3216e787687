"""One question of a general benchmark, whichever published file it was read from."""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from pathlib import Path

LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Question:
    """A row of a published file. ``options`` is empty where the answer is free text.

    ``answer`` is the letter of the right option, or the text itself of an open question. ``pair``
    names what a question shares with its counterpart (MuirBench), ``split`` the part of the file.
    """

    index: str
    text: str
    answer: str
    images: list[Path]
    options: dict[str, str] = field(default_factory=dict)
    hint: str | None = None
    category: str | None = None
    sub_category: str | None = None
    split: str | None = None
    pair: str | None = None


def check_answer(where: str, options: dict[str, str], answer: str) -> None:
    """Refuse a row whose answer cannot be the letter of an option."""
    if options and (len(answer) != 1 or answer not in LETTERS):
        raise ValueError(
            f"{where}, column 'answer': {answer[:40]!r} is not the letter of an option; "
            "download the file again"
        )


def check_unique(path: Path, questions: list[Question]) -> None:
    """Refuse a file in which an index occurs twice: answers are kept by it."""
    seen: set[str] = set()
    for question in questions:
        if question.index in seen:
            raise ValueError(
                f"{path}, column 'index': {question.index!r} occurs twice; download the file again"
            )
        seen.add(question.index)


def pair_name(index: str, counterpart: str | None) -> str | None:
    """The same name for a question and its counterpart."""
    return " + ".join(sorted((index, counterpart))) if counterpart else None
