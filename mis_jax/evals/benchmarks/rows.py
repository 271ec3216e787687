"""Reading the published row format shared by MIS and the mini world."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mis_jax.evals.files import read_json

IMAGE_FIELDS = ("image_path1", "image_path2")


def locate(data_root: Path, benchmark: str) -> Path:
    """The file of a benchmark: in its own folder under the data root, or at the root itself.

    Several benchmarks of one release share their picture folders, so both layouts occur. The
    paths in the rows are relative to the folder that holds the file.
    """
    name = f"{benchmark}.json"
    candidates = (data_root / benchmark / name, data_root / name)
    for path in candidates:
        if path.is_file():
            return path
    raise ValueError(
        f"{benchmark}: neither {candidates[0]} nor {candidates[1]} exists; "
        "give the folder that holds the benchmark's files as --data-root"
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a published file, whose top level is a list or a mapping of rows."""
    rows = read_json(path, "download the file again")
    if isinstance(rows, dict):
        rows = list(rows.values())
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} does not hold a list of rows; download the file again")
    if not rows:
        raise ValueError(f"{path} holds no rows; download the file again")
    return rows


def row_ids(rows: Sequence[dict[str, Any]], field: str = "id") -> list[str]:
    """A unique id for each row: its own, its number where it has none, a suffix where it repeats.

    The published card leaves the id out of its declared fields, so it cannot be relied upon.
    """
    seen: Counter[str] = Counter()
    ids = []
    for number, row in enumerate(rows):
        own = str(row.get(field, number))
        seen[own] += 1
        ids.append(own if seen[own] == 1 else f"{own}#{seen[own]}")
    return ids


def text_field(path: Path, number: int, row: dict[str, Any], field: str) -> str:
    """A field that must hold text."""
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{path}, row {number}: field {field!r} is {value!r}; every row needs text there"
        )
    return value


def row_images(path: Path, number: int, row: dict[str, Any], least: int) -> list[Path]:
    """The pictures of a row, of which at least ``least`` must be named, and all must exist."""
    images = []
    for position, field in enumerate(IMAGE_FIELDS, start=1):
        value = row.get(field)
        if value is None and position > least:
            continue
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"{path}, row {number}: field {field!r} is {value!r}; "
                f"this benchmark needs {least} picture{'s' if least > 1 else ''} a row"
            )
        image = path.parent / value
        if not image.is_file():
            raise ValueError(
                f"{path}, row {number}: field {field!r} names {image}, which does not exist; "
                f"unpack the picture folder beside {path.name}"
            )
        images.append(image)
    return images
