"""The same sets as Hugging Face holds them, for those who have these files and not the TSV.

The fields differ from set to set. Ids are those of these files, so a run over them does not line
up with one over the TSV, and an option called "None" is shown here.
"""

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from mis_jax.evals.vlmevalkit.questions import (
    LETTERS,
    PictureFolder,
    Question,
    check_answer,
    check_unique,
    pair_name,
)

AGAIN = "download the file again"
Fields = Mapping[str, Any]
Maker = Callable[["_Row"], Question]


class _Row:
    """One row with the place to name in an error."""

    def __init__(self, path: Path, number: int, fields: Fields, folder: PictureFolder) -> None:
        self.where = f"{path}, row {number}"
        self.fields = fields
        self._folder = folder

    def text(self, name: str) -> str:
        """A field that must hold text or a number."""
        value = self.maybe(name)
        if value is None:
            raise ValueError(f"{self.where}, column {name!r} is empty; {AGAIN}")
        return value

    def maybe(self, name: str) -> str | None:
        """A field as text, None where it is missing or blank."""
        value = self.fields.get(name)
        return None if value is None or not str(value).strip() else str(value)

    def images(self, columns: Sequence[str]) -> list[Path]:
        """The pictures in columns that hold one, a list of them, or none."""
        found: list[Path] = []
        for name in columns:
            value = self.fields.get(name)
            for picture in value if isinstance(value, list) else [value] * (value is not None):
                where = f"{self.where}, column {name!r}"
                held = picture.get("bytes") if isinstance(picture, Mapping) else picture
                if not isinstance(held, bytes):
                    raise ValueError(f"{where} holds no picture's bytes; {AGAIN}")
                found.append(self._folder.keep(held, where))
        if not found:
            raise ValueError(f"{self.where} has no picture in {', '.join(columns)}; {AGAIN}")
        return found


def read_parquet(folder: Path, pattern: str, columns: Sequence[str], make: Maker) -> list[Question]:
    """The questions of the files under a folder that fit a pattern, in the order of their names.

    Raises:
        ValueError: there is no such file, or one cannot be read; file, row and column are named.
    """
    files = sorted(folder.rglob(pattern))
    if not files:
        raise ValueError(f"{folder} holds no file {pattern}; put the published files there")
    kept = PictureFolder(folder)
    questions = [
        make(_Row(file, number, fields, kept))
        for file in files
        for number, fields in enumerate(_rows(file, columns), start=1)
    ]
    if not questions:
        raise ValueError(f"{folder}: {pattern} holds no questions; {AGAIN}")
    check_unique(folder, questions)
    return questions


def _rows(file: Path, needed: Sequence[str]) -> Iterator[Fields]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file)
        found = table.schema_arrow.names
        lacking = [column for column in needed if column not in found]
        if lacking:
            raise ValueError(
                f"{file} lacks the column(s) {', '.join(lacking)} (it has {', '.join(found)}); "
                "put the file that the benchmark's authors publish there"
            )
        for batch in table.iter_batches(batch_size=16):  # pictures are large
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as Parquet ({error}); {AGAIN}") from error


def _lettered(row: _Row, options: Sequence[Any]) -> dict[str, str]:
    if len(options) > len(LETTERS):
        raise ValueError(f"{row.where}, column 'options' has {len(options)} options; {AGAIN}")
    return dict(zip(LETTERS, map(str, options), strict=False))


def muirbench(row: _Row) -> Question:
    """`MUIRBENCH/MUIRBENCH`, split test."""
    index, answer = row.text("idx"), row.text("answer").strip()
    options = _lettered(row, row.fields["options"] or ())
    check_answer(row.where, options, answer)
    return Question(
        index=index,
        text=row.text("question"),
        answer=answer,
        images=row.images(["image_list"]),
        options=options,
        category=row.maybe("task"),
        sub_category=row.maybe("image_relation"),
        pair=pair_name(index, row.maybe("counterpart_idx")),
    )


def mmmu(row: _Row) -> Question:
    """`MMMU/MMMU` by subjects or `lmms-lab/MMMU` merged; the subject stands in the id."""
    index, answer = row.text("id"), row.text("answer").strip()
    try:
        options = _lettered(row, ast.literal_eval(row.maybe("options") or "[]"))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{row.where}, column 'options' is not a list; {AGAIN}") from error
    check_answer(row.where, options, answer)
    return Question(
        index=index,
        text=row.text("question"),
        answer=answer,
        images=row.images([f"image_{number}" for number in range(1, 8)]),
        options=options,
        category="_".join(index.split("_")[1:-1]) or None,
        sub_category=row.maybe("subfield"),
        split=index.split("_")[0],
    )


def mmstar(row: _Row) -> Question:
    """`Lin-Chen/MMStar`, split val, whose options stand at the end of the question."""
    text, options = split_options(row.where, row.text("question"))
    answer = row.text("answer").strip()
    check_answer(row.where, options, answer)
    return Question(
        index=row.text("index"),
        text=text,
        answer=answer,
        images=row.images(["image"]),
        options=options,
        category=row.maybe("category"),
        sub_category=row.maybe("l2_category"),
    )


def mmt(row: _Row) -> Question:
    """`lmms-lab/MMT_MI-Benchmark`, with its options in columns A to I."""
    answer = row.text("answer").strip()
    options = {letter: text for letter in "ABCDEFGHI" if (text := row.maybe(letter)) is not None}
    check_answer(row.where, options, answer)
    return Question(
        index=row.text("index"),
        text=row.text("question"),
        answer=answer,
        images=row.images(["image"]),
        options=options,
        category=row.maybe("category"),
        sub_category=row.maybe("l2-category"),
        split=row.maybe("split"),
    )


def _next_option(text: str, letter: str) -> tuple[int, int]:
    """Where the text before `, B: ` ends (or before that on a new line), and where B begins."""
    for begin in (match.start() for match in re.finditer(rf"{letter}[:.]\s", text)):
        end = begin
        while end and text[end - 1].isspace():
            end -= 1
        if text[end - 1 : end] == ",":
            return end - 1, begin
        if "\n" in text[end:begin]:
            return end, begin
    return len(text), len(text)


def split_options(where: str, text: str) -> tuple[str, dict[str, str]]:
    """`question\\nOptions: A: one, B: two` as the question and its options."""
    question, found, rest = text.rpartition("Options:")
    options: dict[str, str] = {}
    for letter, after in pairwise(LETTERS):
        begin = re.match(rf"\s*{letter}[:.]\s*", rest)
        if not begin:
            break
        rest = rest[begin.end() :]
        end, next_begin = _next_option(rest, after)
        options[letter] = rest[:end].strip()
        rest = rest[next_begin:]
        if not rest:
            break
    if not found or len(options) < 2:
        raise ValueError(
            f"{where}, column 'question' does not end with its options; use VLMEvalKit's TSV"
        )
    return question.rstrip("\n"), options
