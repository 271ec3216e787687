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
from collections import Counter
from collections.abc import Mapping, Sequence
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
AGAIN = "download the file again"


@dataclass(frozen=True)
class Question:
    """A question of a published file. `options` is empty where the answer is free text.

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


@dataclass(frozen=True)
class Entry:
    """What a published file holds of one question, with the place to name in an error."""

    where: str
    fields: Mapping[str, Any]

    def text(self, column: str) -> str:
        """A field that must hold text or a number."""
        value = self.fields.get(column)
        if value is None or not str(value).strip():
            raise ValueError(f"{self.where}, column {column!r} is empty; {AGAIN}")
        return str(value)

    def maybe(self, column: str) -> str | None:
        """A field as text, None where it is missing or blank."""
        value = self.fields.get(column)
        return None if value is None or not str(value).strip() else str(value)

    def question(
        self, index: str, images: list[Path], options: dict[str, str], **others: str | None
    ) -> Question:
        """The question; ValueError for an answer that cannot be the letter of an option."""
        answer = self.text("answer").strip()
        if options and (len(answer) != 1 or answer not in LETTERS):
            raise ValueError(
                f"{self.where}, column 'answer': {answer[:40]!r} is not the letter of an option; "
                f"{AGAIN}"
            )
        return Question(index, self.text("question"), answer, images, options, **others)


def check_columns(path: Path, columns: Sequence[str], needed: Sequence[str], origin: str) -> None:
    """Refuse a file without a column; `origin` says whose file to put in its place."""
    if missing := [column for column in needed if column not in columns]:
        present = ", ".join(name[:20] for name in columns[:20]) or "none"
        raise ValueError(
            f"{path} lacks the column(s) {', '.join(missing)} (it has {present}); "
            f"put the file that {origin} there"
        )


def checked(path: Path, questions: list[Question], part: str = "") -> list[Question]:
    """The questions; ValueError for none, or an index that occurs twice: answers are kept by it."""
    if not questions:
        raise ValueError(f"{path} holds no questions{part}; {AGAIN}")
    for index, count in Counter(question.index for question in questions).items():
        if count > 1:
            raise ValueError(f"{path}, column 'index': {index!r} occurs twice; {AGAIN}")
    return questions


def pair_name(index: str, counterpart: str | None) -> str | None:
    """The same name for a question and its counterpart."""
    return " + ".join(sorted((index, counterpart))) if counterpart else None


PROTOCOL = "vlmevalkit@e8e78f0/internvl"
MAX_NEW_TOKENS = 4096
TOTAL_TILES = 64
"""What all images of a question share, on top of each one's own limit."""

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
    body = "\n".join(lines)
    if _CHINESE.search(body):
        how = _LETTER_CHINESE if question.options else _OPEN_CHINESE
    else:
        how = _LETTER if question.options else _OPEN
    return f"{body}\n{how}"


def name_places(text: str, images: int) -> str:
    """MuirBench's markers as names: one run of all of them goes, single ones become `<Image-k>`.

    The images themselves stand before the text, so a marker within it can only point to them.
    """
    text = text.replace(" ".join([MARKER] * images), "")
    for number in range(1, images + 1):
        text = text.replace(MARKER, f"<Image-{number}>", 1)
    return text


def prompt_content(text: str, images: int, *, numbered: bool) -> str | list[dict[str, Any]]:
    """The images and then the text; `numbered` announces each as `Image-k`.

    It is a list of parts where the text says `<image>` itself, which stays text.
    """
    names = [f"Image-{number}: " if numbered else "" for number in range(1, images + 1)]
    if MARKER not in text:
        return "".join(f"{name}{MARKER}\n" for name in names) + text
    parts: list[dict[str, Any]] = []
    for name in names:
        parts += [{"type": "text", "text": name}] * bool(name)
        parts.append({"type": "image"})  # which brings its line break
    return [*parts, {"type": "text", "text": text}]


def tiles_of(limit: int, images: int) -> int:
    """Tiles of each image when a question has so many of them; at least one."""
    return max(1, min(limit, TOTAL_TILES // images))


def sample_of(
    question: Question, *, limit: int, places: bool = False, first_image_scale: int = 1
) -> Sample:
    """A question as it is put to the model.

    `limit` is the tiles of an image, `places` says that its text marks them (MuirBench).
    """
    count = len(question.images)
    text = question_text(question)
    if places:
        text = name_places(text, count)
    content = prompt_content(text, count, numbered=places or count > 1)
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
        [{"role": "user", "content": content}],
        question.images,
        meta,
        max_tiles_per_image=tiles_of(limit, count),
        first_image_scale=first_image_scale,
    )


_SUFFIXES = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG\r\n\x1a\n": ".png",
    b"GIF8": ".gif",
    b"BM": ".bmp",
}


def image_suffix(content: bytes) -> str | None:
    """The suffix that fits the first bytes of an image; None for what is none of these formats."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for head, suffix in _SUFFIXES.items() if content.startswith(head)), None)


class ImageFolder:
    """Where the images of the tables in a folder are kept; made with the first image."""

    def __init__(self, tables: Path) -> None:
        self._preferred = tables / "pictures"
        self._folder: Path | None = None

    def write(self, content: bytes, where: str) -> Path:
        """The file that holds an image, written if it is not there yet."""
        suffix = image_suffix(content)
        if suffix is None:
            raise ValueError(
                f"{where}: the {len(content)} bytes there are no JPEG, PNG, WebP, GIF or BMP; "
                f"{AGAIN}"
            )
        if self._folder is None:
            self._folder = _writable(self._preferred)
        path = self._folder / f"{hashlib.sha256(content).hexdigest()[:32]}{suffix}"
        # The size too: a machine that lost power may have kept the name and not the bytes.
        if not path.is_file() or path.stat().st_size != len(content):
            replace_file(path, content, durable=False)
        return path


def _writable(preferred: Path) -> Path:
    if is_writable(preferred):
        return preferred
    try:
        own = own_temporary_folder("mis_jax-pictures")
    except ValueError as error:
        raise ValueError(
            f"{preferred} cannot be written to and {error}; make the first writable, or remove the "
            "second"
        ) from None
    folder = own / hashlib.sha256(str(preferred.absolute()).encode()).hexdigest()[:16]
    make_folder(folder, mode=0o700)
    return folder
