"""One reader of the sets' published files: JSON lists and mappings, and CSV tables."""

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mis_jax.data.chat_template import IMAGE_MARKER
from mis_jax.evals.types import Benchmark, Sample
from mis_jax.storage.files import open_text
from mis_jax.storage.json_files import read_document

AGAIN = "download the file again"
_IMAGE_FIELDS = ("image_path1", "image_path2")

asked_as_mis = partial(
    Benchmark, default_judge=None, max_new_tokens=1024, system="none", max_tiles_per_image=4
)
"""A safety set. The paper does not say how it answered those beside MIS, so they are answered as
MIS is, unless a set says otherwise; their labels need a language model as judge."""


@dataclass(frozen=True)
class Annotation:
    """One entry of a published file; its errors name file, entry and field."""

    path: Path
    where: str
    id: str
    fields: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where its file lies."""
        return self.path.parent

    def text(self, field: str) -> str:
        """A field that must hold text."""
        value = self.fields.get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"field {field!r} is {value!r}; every row needs text there")
        return value

    def question(self, field: str) -> str:
        """What is asked about an image; where a real file leaves it empty, the image asks alone."""
        value = self.fields.get(field, ...)
        if value is None or (isinstance(value, str) and not value.strip()):
            return ""
        return self.text(field)

    def filled(self, field: str, kind: type) -> Any:
        """A field that must hold a list or a mapping with something in it."""
        value = self.fields.get(field)
        if not isinstance(value, kind) or not value:
            needed = "list" if kind is list else "mapping"
            raise self.error(
                f"field {field!r} is {value!r}; every row needs a filled {needed} there: {AGAIN}"
            )
        return value

    def images(self, least: int) -> list[Path]:
        """MIS's two image fields, of which at least `least` must be named, and all must exist."""
        images = []
        for position, field in enumerate(_IMAGE_FIELDS, start=1):
            value = self.fields.get(field)
            if value is None and position > least:
                continue
            if not isinstance(value, str) or not value:
                raise self.error(
                    f"field {field!r} is {value!r}; "
                    f"this benchmark needs {least} picture{'s' if least > 1 else ''} a row"
                )
            image = self.folder / value
            if not image.is_file():
                raise self.error(
                    f"field {field!r} names {image}, which does not exist; "
                    f"unpack the picture folder beside {self.path.name}"
                )
            images.append(image)
        return images

    def sample(self, text: str, image: Path, meta: dict[str, Any], suffix: str = "") -> Sample:
        """A question about one image as InternVL is asked it: the image, a line break, the text."""
        content: Any = f"{IMAGE_MARKER}\n{text}"
        if IMAGE_MARKER in text:  # a marker that the question itself holds is words, not an image
            content = [{"type": "image"}, {"type": "text", "text": text}]
        return Sample(self.id + suffix, [{"role": "user", "content": content}], [image], meta)

    def error(self, problem: str) -> ValueError:
        """The error to raise about this entry."""
        return ValueError(f"{self.path}, {self.where}: {problem}")


def load_table(
    folder: str,
    names: Sequence[str],
    samples_of: Callable[[Annotation], Iterable[Sample]],
    data_root: Path,
    *,
    id_fields: Sequence[str] = ("id",),
    columns: Sequence[str] = (),
) -> list[Sample]:
    """The samples of a set in one file; see `find_file` and `read_annotations`."""
    path = find_file(data_root, folder, names)
    annotations = read_annotations(path, id_fields, columns)
    return with_images(path, [s for annotation in annotations for s in samples_of(annotation)])


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


def find_mis_file(data_root: Path, benchmark: str) -> Path:
    """The file of a benchmark: in its own folder under the data root, or at the root itself.

    Several benchmarks of one release share their image folders, so both layouts occur. The paths
    in the annotations are relative to the folder that holds the file.
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


def find_image(name: str, *folders: Path) -> Path:
    """Where an image is, of several folders it may be unpacked to; else the first place."""
    places = [folder / name for folder in folders]
    return next((place for place in places if place.is_file()), places[0])


def with_images(path: Path, samples: list[Sample]) -> list[Sample]:
    """The samples; ValueError for images that are not there, all at once: a set may lack many."""
    images = [(sample.id, image) for sample in samples for image in sample.images]
    missing = [(key, image) for key, image in images if not image.is_file()]
    if missing:
        key, image = missing[0]
        raise ValueError(
            f"{path}: {len(missing)} of its {len(images)} pictures do not exist (first: sample "
            f"{key}, {image}); unpack the published pictures there, or take the rows without "
            "pictures out of the file (the smaller size is then reported)"
        )
    return samples


def read_annotations(
    path: Path, id_fields: Sequence[str] = ("id",), columns: Sequence[str] = ()
) -> list[Annotation]:
    """The entries of a JSON file, or of a CSV file that must have these columns."""
    entries = _read_csv(path, columns) if path.suffix == ".csv" else _read_json(path)
    if not entries:
        raise ValueError(f"{path} holds no rows; {AGAIN}")
    ids = unique_ids(entries, id_fields)
    return [
        Annotation(path, f"row {number}", key, fields)
        for number, (key, fields) in enumerate(zip(ids, entries, strict=True))
    ]


def unique_ids(entries: Sequence[dict[str, Any]], fields: Sequence[str] = ("id",)) -> list[str]:
    """A unique id for each entry: its own, its number where it has none, a suffix where it repeats.

    The published card leaves the id out of its declared fields, so it cannot be relied upon.
    """
    seen: Counter[str] = Counter()
    ids = []
    for number, entry in enumerate(entries):
        own = "-".join(str(entry.get(field, number)) for field in fields)
        seen[own] += 1
        ids.append(own if seen[own] == 1 else f"{own}#{seen[own]}")
    return ids


def _read_json(path: Path) -> list[dict[str, Any]]:
    """A list of entries, or the values of a mapping."""
    entries = read_document(path, AGAIN)
    if isinstance(entries, dict):
        entries = list(entries.values())
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} does not hold a list of rows; {AGAIN}")
    return entries


def _read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    try:
        # utf-8-sig: files that went through a spreadsheet begin with a byte order mark.
        with open_text(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            entries = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as CSV ({error}); {AGAIN}") from error
    header = reader.fieldnames or ()
    if missing := [name for name in columns if name not in header]:
        raise ValueError(
            f"{path} has no column {', '.join(map(repr, missing))} (it has "
            f"{', '.join(header) or 'none'}); download the published file again"
        )
    for number, entry in enumerate(entries):
        if None in entry or None in entry.values():  # how DictReader marks too many and too few
            raise ValueError(
                f"{path}, row {number}: has not one cell for each of the {len(header)} columns; "
                f"{AGAIN}"
            )
    return entries
