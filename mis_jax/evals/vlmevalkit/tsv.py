"""VLMEvalKit's TSV of a benchmark: one row a question, its images inside as base64.

An image cell holds one image, a written-out list of several, or the index of the row whose
images it shares. Rows are read one after the other and their images go to files at once, since
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
    AGAIN,
    LETTERS,
    Entry,
    ImageFolder,
    Question,
    check_columns,
    checked,
    pair_name,
)
from mis_jax.storage.files import open_binary, open_text

REQUIRED = ("index", "image", "question", "answer", "A", "B")
LONGEST_REFERENCE = 64
"""An image cell of at most so many characters is the index of another row."""
LONGEST_CELL = 2**31 - 1

ABSENT = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"}
    | {"<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
)
"""Cells that pandas, with which VLMEvalKit reads, takes for missing. An option called "None" is
therefore not shown there, and not here."""

_Images = dict[str, list[Path] | str]
"""The images of each index, or the index of the row that has them."""


@dataclass(frozen=True)
class _Entry(Entry):
    def maybe(self, column: str) -> str | None:
        """A cell's text, None where VLMEvalKit finds it missing or the file lacks the column."""
        value = self.fields.get(column)
        return None if value is None or value in ABSENT else value

    def first_of(self, *columns: str) -> str | None:
        """The text of the first column that has one; files differ in how they spell some."""
        return next((text for column in columns if (text := self.maybe(column))), None)

    @property
    def index(self) -> str:
        """What other entries and the answers refer to it by."""
        return self.text("index").strip()


def read_tsv(path: Path, *, split: str | None = None) -> list[Question]:
    """The questions of a file, or of one of its splits, in its order.

    A row without an image is left out, as VLMEvalKit does; the number of samples shows it.

    Raises:
        ValueError: the file is cut short, has other columns or cells that cannot be read; file,
            row and column are named.
    """
    folder = ImageFolder(path.parent)
    images: _Images = {}
    entries: list[_Entry] = []
    for where, cells in _read(path, REQUIRED if split is None else (*REQUIRED, "split")):
        cell = cells.pop("image")
        if cell in ABSENT:
            continue
        entry = _Entry(where, cells)
        images[entry.index] = _images_in(where, cell, folder)
        entries.append(entry)
    if entries:
        _check_end(path, entries[-1], images)
    questions = [
        _question(entry, _resolved(entry, images))
        for entry in entries
        if split is None or entry.maybe("split") == split
    ]
    return checked(path, questions, "" if split is None else f" of split {split!r}")


def _read(path: Path, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The place and the cells of every row."""
    before = csv.field_size_limit(LONGEST_CELL)  # a global of the csv module
    try:
        with open_text(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter="\t")
            header = next(reader, [])
            check_columns(path, header, needed, "VLMEvalKit publishes")
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
                yield where, dict(zip(header, cells, strict=True))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); {AGAIN}") from error
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as a TSV ({error}); {AGAIN}") from error
    finally:
        csv.field_size_limit(before)


def _images_in(where: str, cell: str, folder: ImageFolder) -> list[Path] | str:
    """A cell's images, or the index of the row that has them."""
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
    return [folder.write(_decoded(where, text), where) for text in texts]


def _decoded(where: str, text: str) -> bytes:
    if "\n" in text:  # base64 in lines, which is allowed
        text = "".join(text.split())
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where} is not base64 ({error}); {AGAIN}") from error


def _check_end(path: Path, last: _Entry, images: _Images) -> None:
    """Refuse a file that ends within an image: half of one is sound base64 in a case of four."""
    with open_binary(path) as stream:
        stream.seek(-1, os.SEEK_END)
        if stream.read() == b"\n":
            return
    for image in _resolved(last, images):
        try:
            open_image(image)
        except ValueError as error:
            raise ValueError(
                f"{last.where}, column 'image': the file ends within it ({error}); {AGAIN}"
            ) from error


def _resolved(entry: _Entry, images: _Images) -> list[Path]:
    own = images[entry.index]
    shared = images.get(own) if isinstance(own, str) else own
    if shared is None or isinstance(shared, str):
        raise ValueError(
            f"{entry.where}, column 'image' is {own!r}, which is not the index of a row with "
            f"pictures; {AGAIN}"
        )
    return shared


def _question(entry: _Entry, images: list[Path]) -> Question:
    return entry.question(
        entry.index,
        images,
        {letter: text for letter in LETTERS if (text := entry.maybe(letter)) is not None},
        hint=entry.maybe("hint"),
        category=entry.first_of("category", "task"),
        sub_category=entry.first_of("l2-category", "l2_category"),
        split=entry.maybe("split"),
        pair=pair_name(entry.first_of("idx") or entry.index, entry.maybe("counterpart_idx")),
    )


def file_md5(path: Path) -> str:
    """The MD5 of a file, which is what VLMEvalKit publishes beside it."""
    digest = hashlib.md5(usedforsecurity=False)
    with open_binary(path) as stream:
        while part := stream.read(2**20):
            digest.update(part)
    return digest.hexdigest()
