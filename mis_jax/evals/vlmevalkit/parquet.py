"""The same sets as Hugging Face holds them, for those who have these files and not the TSV.

The fields differ from set to set. Ids are those of these files, so a run over them does not line
up with one over the TSV, and an option called "None" is shown here.
"""

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from mis_jax.evals.vlmevalkit.questions import (
    AGAIN,
    LETTERS,
    Entry,
    ImageFolder,
    Question,
    check_columns,
    checked,
    pair_name,
)


@dataclass(frozen=True)
class _Entry(Entry):
    folder: ImageFolder

    def images(self, *columns: str) -> list[Path]:
        """The images in columns that hold one, a list of them, or none."""
        paths: list[Path] = []
        for column in columns:
            value = self.fields.get(column)
            for image in value if isinstance(value, list) else [value] * (value is not None):
                where = f"{self.where}, column {column!r}"
                content = image.get("bytes") if isinstance(image, Mapping) else image
                if not isinstance(content, bytes):
                    raise ValueError(f"{where} holds no picture's bytes; {AGAIN}")
                paths.append(self.folder.write(content, where))
        if not paths:
            raise ValueError(f"{self.where} has no picture in {', '.join(columns)}; {AGAIN}")
        return paths


Maker = Callable[[_Entry], Question]


def read_parquet(folder: Path, pattern: str, columns: Sequence[str], make: Maker) -> list[Question]:
    """The questions of the files under a folder that fit a pattern, in the order of their names.

    Raises:
        ValueError: there is no such file, or one cannot be read; file, row and column are named.
    """
    files = sorted(folder.rglob(pattern))
    if not files:
        raise ValueError(f"{folder} holds no file {pattern}; put the published files there")
    images = ImageFolder(folder)
    entries = (
        _Entry(f"{file}, row {number}", fields, images)
        for file in files
        for number, fields in enumerate(_read(file, columns), start=1)
    )
    return checked(folder / pattern, [make(entry) for entry in entries])


def _read(file: Path, needed: Sequence[str]) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file)
        check_columns(file, table.schema_arrow.names, needed, "the benchmark's authors publish")
        for batch in table.iter_batches(batch_size=16):  # images are large
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as Parquet ({error}); {AGAIN}") from error


def _lettered(where: str, options: Sequence[Any]) -> dict[str, str]:
    if len(options) > len(LETTERS):
        raise ValueError(f"{where}, column 'options' has {len(options)} options; {AGAIN}")
    return dict(zip(LETTERS, map(str, options), strict=False))


def muirbench(entry: _Entry) -> Question:
    """`MUIRBENCH/MUIRBENCH`, split test."""
    index = entry.text("idx")
    return entry.question(
        index,
        entry.images("image_list"),
        _lettered(entry.where, entry.fields["options"] or ()),
        category=entry.maybe("task"),
        sub_category=entry.maybe("image_relation"),
        pair=pair_name(index, entry.maybe("counterpart_idx")),
    )


def mmmu(entry: _Entry) -> Question:
    """`MMMU/MMMU` by subjects or `lmms-lab/MMMU` merged; the subject stands in the id."""
    index = entry.text("id")
    try:
        options = _lettered(entry.where, ast.literal_eval(entry.maybe("options") or "[]"))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{entry.where}, column 'options' is not a list; {AGAIN}") from error
    return entry.question(
        index,
        entry.images(*(f"image_{number}" for number in range(1, 8))),
        options,
        category="_".join(index.split("_")[1:-1]) or None,
        sub_category=entry.maybe("subfield"),
        split=index.split("_")[0],
    )


def mmstar(entry: _Entry) -> Question:
    """`Lin-Chen/MMStar`, split val, whose options stand at the end of the question."""
    text, options = split_options(entry.where, entry.text("question"))
    question = entry.question(
        entry.text("index"),
        entry.images("image"),
        options,
        category=entry.maybe("category"),
        sub_category=entry.maybe("l2_category"),
    )
    return replace(question, text=text)


def mmt(entry: _Entry) -> Question:
    """`lmms-lab/MMT_MI-Benchmark`, with its options in columns A to I."""
    return entry.question(
        entry.text("index"),
        entry.images("image"),
        {letter: text for letter in "ABCDEFGHI" if (text := entry.maybe(letter)) is not None},
        category=entry.maybe("category"),
        sub_category=entry.maybe("l2-category"),
        split=entry.maybe("split"),
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
    question, separator, rest = text.rpartition("Options:")
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
    if not separator or len(options) < 2:
        raise ValueError(
            f"{where}, column 'question' does not end with its options; use VLMEvalKit's TSV"
        )
    return question.rstrip("\n"), options
