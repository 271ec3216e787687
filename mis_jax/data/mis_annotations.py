"""The rows of the published MIS files, read and checked one by one; no image is opened here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mis_jax.data.chat_template import from_sharegpt, insert_image_markers
from mis_jax.parsing import parse_json

PUBLISHED_SIZES = {"train": 3927, "easy": 1675, "hard": 510, "real": 100}
VERSION = "1.0.0"  # of the set that is built of them
BadSample = dict[str, Any]  # split, row (its number in the file), id, reason


@dataclass(frozen=True)
class Sample:
    """A row of a published file whose text is in order."""

    split: str
    number: int  # of the row in its file, from 0
    id: str
    row: Mapping[str, Any]  # as published
    names: tuple[str, ...]  # of its images, as the row gives them
    sizes: tuple[tuple[int, int], ...] = ()  # width and height of each, once they are decoded


@dataclass
class Split:
    """One published file: its good rows, its bad ones, and how many there are in all."""

    path: Path
    rows: int
    samples: list[Sample] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)

    def reject(self, split: str, number: int, id: str, reason: str) -> None:
        """Enter a bad sample."""
        self.bad.append({"split": split, "row": number, "id": id, "reason": reason})


def annotation_path(root: Path, split: str) -> Path:
    """The published file of a split."""
    return root / f"mis_{split}.json"


def read_published(root: Path) -> dict[str, Split]:
    """Every published file that `root` has, by split.

    Raises:
        ValueError: there is none, or one that is not a list (or mapping) of rows.
    """
    found = {split: annotation_path(root, split) for split in PUBLISHED_SIZES}
    present = {split: path for split, path in found.items() if path.is_file()}
    if not present:
        names = ", ".join(path.name for path in found.values())
        raise ValueError(f"{root}: has none of {names}; give the folder of the published MIS files")
    return {split: _read_split(split, path) for split, path in present.items()}


def _read_split(split: str, path: Path) -> Split:
    entries = _read_entries(path)
    read = Split(path, len(entries))
    for number, entry in enumerate(entries):
        own = entry.get("id") if isinstance(entry, dict) else None
        id = str(number if own is None else own).encode(errors="replace").decode()
        try:
            names = _checked_names(split, entry)
        except ValueError as error:
            read.reject(split, number, id, str(error))
        else:
            read.samples.append(Sample(split, number, id, entry, names))
    return read


def _read_entries(path: Path) -> list[Any]:
    """The entries of a file whose top level is a list or a mapping of rows."""
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path}: not valid JSON ({error}); download the file again") from None
    entries = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: does not hold a list of samples; download the file again")
    return entries


def _checked_names(split: str, row: Any) -> tuple[str, ...]:
    """The images of a row whose text is in order; ValueError with the field and the remedy."""
    if not isinstance(row, dict):
        raise ValueError(f"the entry is {row!r:.60}; expected an object: remove or repair it")
    for name in ("category", "sub_category"):
        if not isinstance(row.get(name) or "", str):
            raise ValueError(f"field '{name}' is {row[name]!r:.60}; give text or leave it out")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds text that UTF-8 cannot store ({error}); repair it") from None
    return _train_names(row) if split == "train" else _test_names(row)


def _train_names(row: dict[str, Any]) -> tuple[str, ...]:
    """`image` is a path or a list of paths, `conversations` ends with an answer."""
    if "image" not in row:
        raise ValueError("field 'image' is missing; name the images or remove the row")
    given = row["image"]
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(f"field 'image' is {given!r:.60}; give a path or a list of paths")
    if "conversations" not in row:
        raise ValueError("field 'conversations' is missing; add the turns or remove the row")
    insert_image_markers(from_sharegpt(row), len(names))
    return tuple(names)


def _test_names(row: dict[str, Any]) -> tuple[str, ...]:
    """A question and two images."""
    for name in ("question", "image_path1", "image_path2"):
        if name not in row:
            raise ValueError(f"field '{name}' is missing; add it or remove the row")
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"field '{name}' is {row[name]!r:.60}; give text or remove the row")
    return row["image_path1"], row["image_path2"]
