"""A question of a general benchmark, whichever published file it was read from, and its prompt.

The text is what VLMEvalKit's InternVL class puts before a model, with its limits of tiles. The
words are the protocol: a published score belongs to them.

Images that lie inside a table are written out as files once. They go to `pictures/` beside the
table or, where that cannot be written to, to a private folder under the system's temporary one. A
file is named by the hash of its content and appears whole or not at all, so an extraction that was
killed goes on where it stopped, a changed table cannot meet an old image, and several processes may
extract at once.
"""

import hashlib
import re
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mis_jax.evals.types import Sample
from mis_jax.storage.files import (
    is_writable,
    make_folder,
    own_temporary_folder,
    replace_file,
)

LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Question:
    """A row of a published file. `options` is empty where the answer is free text.

    `answer` is the letter of the right option, or the text itself of an open question. `pair`
    names what a question shares with its counterpart (MuirBench), `split` the part of the file.
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
    """MuirBench's markers as names: one row of all of them goes, single ones become `<Image-k>`.

    The pictures themselves stand before the text, so a marker within it can only point to them.
    """
    text = text.replace(" ".join([MARKER] * images), "")
    for number in range(1, images + 1):
        text = text.replace(MARKER, f"<Image-{number}>", 1)
    return text


def prompt_content(text: str, images: int, *, numbered: bool) -> str | list[dict[str, Any]]:
    """The pictures and then the text; `numbered` announces each as `Image-k`.

    It is a list of parts where the text says `<image>` itself, which stays text.
    """
    announced = [f"Image-{number}: " if numbered else "" for number in range(1, images + 1)]
    if MARKER not in text:
        return "".join(f"{name}{MARKER}\n" for name in announced) + text
    parts: list[dict[str, Any]] = []
    for name in announced:
        parts += [{"type": "text", "text": name}] * bool(name)
        parts.append({"type": "image"})  # which brings its line break
    return [*parts, {"type": "text", "text": text}]


def tiles_of(limit: int, images: int) -> int:
    """Tiles of each picture when a question has so many of them; at least one."""
    return max(1, min(limit, TOTAL_TILES // images))


def sample_of(
    question: Question, *, limit: int, places: bool = False, first_image_scale: int = 1
) -> Sample:
    """A question as the model is asked it.

    `limit` is the tiles of a picture, `places` says that its text marks them (MuirBench).
    """
    count = len(question.images)
    text = question_text(question)
    if places:
        text = name_places(text, count)
    shown = prompt_content(text, count, numbered=places or count > 1)
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
        max_tiles_per_image=tiles_of(limit, count),
        first_image_scale=first_image_scale,
    )


_KINDS = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG\r\n\x1a\n": ".png",
    b"GIF8": ".gif",
    b"BM": ".bmp",
}


def picture_kind(content: bytes) -> str | None:
    """The suffix that fits the first bytes of a picture; None for what is no known picture."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    return next((kind for head, kind in _KINDS.items() if content.startswith(head)), None)


class PictureFolder:
    """Where the pictures of the tables in a folder are kept; made with the first picture."""

    def __init__(self, tables: Path) -> None:
        self._wanted = tables / "pictures"
        self._folder: Path | None = None

    def keep(self, content: bytes, where: str) -> Path:
        """The file that holds a picture, written if it is not there yet."""
        kind = picture_kind(content)
        if kind is None:
            raise ValueError(
                f"{where}: the {len(content)} bytes there are no JPEG, PNG, WebP, GIF or BMP; "
                "download the file again"
            )
        if self._folder is None:
            self._folder = _writable(self._wanted)
        path = self._folder / f"{hashlib.sha256(content).hexdigest()[:32]}{kind}"
        # The size too: a machine that lost power may have kept the name and not the bytes.
        if not path.is_file() or path.stat().st_size != len(content):
            replace_file(path, content, durable=False)
        return path


def _writable(wanted: Path) -> Path:
    if is_writable(wanted):
        return wanted
    try:
        own = own_temporary_folder("mis_jax-pictures")
    except ValueError as error:
        raise ValueError(
            f"{wanted} cannot be written to and {error}; make the first writable, or remove the "
            "second"
        ) from None
    folder = own / hashlib.sha256(str(wanted.absolute()).encode()).hexdigest()[:16]
    make_folder(folder, mode=0o700)
    return folder
