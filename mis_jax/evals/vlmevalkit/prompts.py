"""The text that VLMEvalKit's InternVL class puts before a model, and its limits of tiles.

The words are the protocol: a published score belongs to them.
"""

from __future__ import annotations

import re
from typing import Any

from mis_jax.evals.types import Sample
from mis_jax.evals.vlmevalkit.questions import Question

PROTOCOL = "vlmevalkit@e8e78f0/internvl"
MAX_NEW_TOKENS = 4096
TOTAL_TILES = 64
"""What all pictures of a question share, on top of each one's own limit."""

MARKER = "<image>"
_LETTER = "Answer with the option's letter from the given choices directly."
_OPEN = "Answer the question directly."
_LETTER_CHINESE = "请直接回答选项字母。"
_OPEN_CHINESE = "请直接回答问题。"
_CHINESE = re.compile("[\u4e00-\u9fff]")


def question_text(question: Question) -> str:
    """Hint, question, options and how to answer, a line each."""
    lines = [question.text] if question.hint is None else [question.hint, question.text]
    lines += [f"{letter}. {text}" for letter, text in question.options.items()]
    asked = "\n".join(lines)
    if _CHINESE.search(asked):
        how = _LETTER_CHINESE if question.options else _OPEN_CHINESE
    else:
        how = _LETTER if question.options else _OPEN
    return f"{asked}\n{how}"


def name_places(text: str, images: int) -> str:
    """MuirBench's markers as names: one row of all of them goes, single ones become ``<Image-k>``.

    The pictures themselves stand before the text, so a marker within it can only point to them.
    """
    text = text.replace(" ".join([MARKER] * images), "")
    for number in range(1, images + 1):
        text = text.replace(MARKER, f"<Image-{number}>", 1)
    return text


def content(text: str, images: int, *, numbered: bool) -> str | list[dict[str, Any]]:
    """The pictures and then the text; ``numbered`` announces each as ``Image-k``.

    It is a list of parts where the text says ``<image>`` itself, which stays text.
    """
    announced = [f"Image-{number}: " if numbered else "" for number in range(1, images + 1)]
    if MARKER not in text:
        return "".join(f"{name}{MARKER}\n" for name in announced) + text
    parts: list[dict[str, Any]] = []
    for name in announced:
        parts += [{"type": "text", "text": name}] * bool(name)
        parts.append({"type": "image"})  # which brings its line break
    return [*parts, {"type": "text", "text": text}]


def tiles(limit: int, images: int) -> int:
    """Tiles of each picture when a question has so many of them; at least one."""
    return max(1, min(limit, TOTAL_TILES // images))


def sample(
    question: Question, *, limit: int, places: bool = False, first_image_scale: int = 1
) -> Sample:
    """A question as the model is asked it.

    ``limit`` is the tiles of a picture, ``places`` says that its text marks them (MuirBench).
    """
    count = len(question.images)
    text = question_text(question)
    if places:
        text = name_places(text, count)
    shown = content(text, count, numbered=places or count > 1)
    meta = {
        "question": question.text,
        "options": question.options,
        "answer": question.answer,
        "category": question.category,
        "sub_category": question.sub_category,
    }
    meta |= {"split": question.split} if question.split else {}
    meta |= {"group": question.pair} if question.pair else {}
    return Sample(
        question.index,
        [{"role": "user", "content": shown}],
        question.images,
        meta,
        max_tiles_per_image=tiles(limit, count),
        first_image_scale=first_image_scale,
    )
