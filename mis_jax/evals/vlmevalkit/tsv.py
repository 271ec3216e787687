"""VLMEvalKit's TSV of a benchmark: one row a question, its pictures inside as base64.

A picture cell holds one picture, a written-out list of several, or the index of the row whose
pictures it shares. Rows are read one after the other and their pictures go to files at once, since
a file has up to a gigabyte.
"""

import ast
import base64
import binascii
import csv
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mis_jax.data.images import open_image
from mis_jax.evals.vlmevalkit.questions import (
    LETTERS,
    PictureFolder,
    Question,
    check_answer,
    check_unique,
    pair_name,
)
from mis_jax.storage.files import open_binary, open_text

REQUIRED = ("index", "image", "question", "answer", "A", "B")
LONGEST_REFERENCE = 64
"""A picture cell of at most so many characters is the index of another row."""
LONGEST_CELL = 2**31 - 1
AGAIN = "download the file again"

ABSENT = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"}
    | {"<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
)
"""Cells that pandas, with which VLMEvalKit reads, takes for missing. An option called "None" is
therefore not shown there, and not here."""


@dataclass(frozen=True)
class _Row:
    where: str
    cells: dict[str, str]

    def text(self, column: str) -> str | None:
        """A cell's text, None where VLMEvalKit finds it missing or the file lacks the column."""
        value = self.cells.get(column)
        return None if value is None or value in ABSENT else value

    def first_of(self, *columns: str) -> str | None:
        """The text of the first column that has one; files differ in how they spell some."""
        return next((found for column in columns if (found := self.text(column))), None)

    def needed(self, column: str) -> str:
        """A cell that must hold text; "None" and its like are text here."""
        value = self.cells[column].strip()
        if not value:
            raise ValueError(f"{self.where}, column {column!r} is empty; {AGAIN}")
        return value


def read_tsv(path: Path, *, split: str | None = None) -> list[Question]:
    """The questions of a file, or of one of its splits, in its order.

    A row without a picture is left out, as VLMEvalKit does; the number of samples tells.

    Raises:
        ValueError: the file is cut short, has other columns or cells that cannot be read; file,
            row and column are named.
    """
    folder = PictureFolder(path.parent)
    pictures: dict[str, list[Path] | str] = {}
    rows: list[_Row] = []
    needed = REQUIRED if split is None else (*REQUIRED, "split")
    for row in _rows(path, needed):
        cell = row.cells.pop("image")
        if cell in ABSENT:
            continue
        index = row.needed("index")
        pictures[index] = _pictures(row.where, cell, folder)
        rows.append(row)
    if rows:
        _check_end(path, rows[-1], pictures)
    questions = [
        _question(row, _resolved(row, pictures))
        for row in rows
        if split is None or row.text("split") == split
    ]
    if not questions:
        part = "" if split is None else f" of split {split!r}"
        raise ValueError(f"{path} holds no questions{part}; {AGAIN}")
    check_unique(path, questions)
    return questions


def _rows(path: Path, needed: Sequence[str]) -> Iterator[_Row]:
    before = csv.field_size_limit(LONGEST_CELL)  # a global of the csv module
    try:
        with open_text(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter="\t")
            header = next(reader, [])
            lacking = [column for column in needed if column not in header]
            if lacking:
                found = ", ".join(name[:20] for name in header[:20]) or "none"
                raise ValueError(
                    f"{path} lacks the column(s) {', '.join(lacking)} (it has {found}); "
                    "put the file that VLMEvalKit publishes there"
                )
            for number, cells in enumerate(reader, start=1):
                if not cells:
                    continue  # an empty line, which pandas skips too
                where = f"{path}, row {number}"
                if len(cells) != len(header):
                    last = header[min(len(cells), len(header)) - 1]
                    raise ValueError(
                        f"{where}, column {last!r}: the row has {len(cells)} cells and the header "
                        f"{len(header)}; the file is cut short or damaged: {AGAIN}"
                    )
                yield _Row(where, dict(zip(header, cells, strict=True)))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); {AGAIN}") from error
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as a TSV ({error}); {AGAIN}") from error
    finally:
        csv.field_size_limit(before)


def _pictures(where: str, cell: str, folder: PictureFolder) -> list[Path] | str:
    """A cell's pictures, or the index of the row that has them."""
    if len(cell) <= LONGEST_REFERENCE:
        return cell
    where = f"{where}, column 'image'"
    texts = [cell]
    if cell.startswith("[") and cell.endswith("]"):
        try:
            texts = ast.literal_eval(cell)  # a list of texts and nothing that could run
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(f"{where} is not a list of pictures; {AGAIN}") from error
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where} is not a list of base64 texts; {AGAIN}")
    return [folder.keep(_decoded(where, text), where) for text in texts]


def _decoded(where: str, text: str) -> bytes:
    if "\n" in text:  # base64 in lines, which is allowed
        text = "".join(text.split())
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where} is not base64 ({error}); {AGAIN}") from error


def _check_end(path: Path, last: _Row, pictures: dict[str, list[Path] | str]) -> None:
    """Refuse a file that ends within a picture: half of one is sound base64 in a case of four."""
    with open_binary(path) as stream:
        stream.seek(-1, os.SEEK_END)
        if stream.read() == b"\n":
            return
    for picture in _resolved(last, pictures):
        try:
            open_image(picture)
        except ValueError as error:
            raise ValueError(
                f"{last.where}, column 'image': the file ends within it ({error}); {AGAIN}"
            ) from error


def _resolved(row: _Row, pictures: dict[str, list[Path] | str]) -> list[Path]:
    found = pictures[row.needed("index")]
    if isinstance(found, str):
        shared = pictures.get(found)
        if shared is None or isinstance(shared, str):
            raise ValueError(
                f"{row.where}, column 'image' is {found!r}, which is not the index of a row with "
                f"pictures; {AGAIN}"
            )
        return shared
    return found


def _question(row: _Row, images: list[Path]) -> Question:
    index, answer = row.needed("index"), row.needed("answer")
    options = {letter: text for letter in LETTERS if (text := row.text(letter)) is not None}
    check_answer(row.where, options, answer)
    row.needed("question")
    return Question(
        index=index,
        text=row.cells["question"],
        answer=answer,
        images=images,
        options=options,
        hint=row.text("hint"),
        category=row.first_of("category", "task"),
        sub_category=row.first_of("l2-category", "l2_category"),
        split=row.text("split"),
        pair=pair_name(row.first_of("idx") or index, row.text("counterpart_idx")),
    )


def file_md5(path: Path) -> str:
    """The MD5 of a file, which is what VLMEvalKit publishes beside it."""
    digest = hashlib.md5(usedforsecurity=False)
    with open_binary(path) as stream:
        while part := stream.read(2**20):
            digest.update(part)
    return digest.hexdigest()
