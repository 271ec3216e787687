"""Finding and reading published files, and the samples of the sets with one picture a question."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mis_jax.data.chat_template import IMAGE_MARKER
from mis_jax.evals.types import Benchmark, Sample

asked_as_mis = partial(
    Benchmark, default_judge=None, max_new_tokens=1024, system="none", max_tiles_per_image=4
)
"""A safety set. The paper does not say how it answered those beside MIS, so they are answered as
MIS is, unless a set says otherwise; their labels need a language model as judge."""


def find_file(data_root: Path, folder: str, names: Sequence[str]) -> Path:
    """The first of a set's files that exists under its folder of the data root.

    Several names where a set is published in more than one place or layout.
    """
    candidates = [data_root / folder / name for name in names]
    for path in candidates:
        if path.is_file():
            return path
    raise ValueError(
        f"{' and '.join(map(str, candidates))} do{'' if len(candidates) > 1 else 'es'} not exist; "
        f"put the published files of {folder} there, or give the folder above as --data-root"
    )


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file that must have these columns."""
    try:
        # utf-8-sig: files that went through a spreadsheet begin with a byte order mark.
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read as CSV ({error}); download the file again"
        ) from error
    found = reader.fieldnames or ()
    missing = [name for name in columns if name not in found]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(map(repr, missing))} (it has "
            f"{', '.join(found) or 'none'}); download the published file again"
        )
    if not rows:
        raise ValueError(f"{path} holds no rows; download the file again")
    for number, row in enumerate(rows):
        if None in row or None in row.values():  # how DictReader marks too many and too few
            raise ValueError(
                f"{path}, row {number}: has not one cell for each of the {len(found)} "
                "columns; download the file again"
            )
    return rows


def dict_field(path: Path, where: str, row: dict[str, Any], field: str, kind: type) -> Any:
    """A field that must hold a list or a mapping with something in it."""
    value = row.get(field)
    if not isinstance(value, kind) or not value:
        raise ValueError(
            f"{path}, {where}: field {field!r} is {value!r}; every row needs a filled "
            f"{'list' if kind is list else 'mapping'} there: download the file again"
        )
    return value


def picture(folders: Iterable[Path], name: str) -> Path:
    """Where a picture is, of several folders it may have been unpacked to; else the first place."""
    places = [folder / name for folder in folders]
    return next((place for place in places if place.is_file()), places[0])


def check_pictures(path: Path, samples: Sequence[Sample]) -> None:
    """Refuse samples whose pictures are not there, all at once: a set may lack many."""
    images = [(sample.id, image) for sample in samples for image in sample.images]
    missing = [(key, image) for key, image in images if not image.is_file()]
    if missing:
        key, image = missing[0]
        raise ValueError(
            f"{path}: {len(missing)} of its {len(images)} pictures do not exist (first: sample "
            f"{key}, {image}); unpack the published pictures there, or take the rows without "
            "pictures out of the file (the smaller size is then reported)"
        )


def about_one_picture(key: str, text: str, image: Path, meta: dict[str, Any]) -> Sample:
    """A question about one picture as InternVL is asked it: the picture, a line break, the text."""
    content: Any = f"{IMAGE_MARKER}\n{text}"
    if IMAGE_MARKER in text:  # a marker that the question itself holds is words, not a picture
        content = [{"type": "image"}, {"type": "text", "text": text}]
    return Sample(key, [{"role": "user", "content": content}], [image], meta)
