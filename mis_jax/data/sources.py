"""Training sources: published MIS files, sharegpt JSON and InternVL's jsonl -> rows by index."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mis_jax.config import Source

_log = logging.getLogger(__name__)
PUBLISHED_SIZES = {"train": 3927, "easy": 1675, "hard": 510, "real": 100}


@dataclass(frozen=True)
class Row:
    """One annotation, not yet opened or rendered."""

    id: str
    where: str  # file and place in it, for errors
    images: tuple[Path, ...]
    fields: Mapping[str, Any]  # as in the file; `conversations` is checked when rendered


def read_sources(sources: Sequence[Source], seed: int) -> list[Row]:
    """All rows of all sources, one after the other.

    A source with `count` gives that many rows, chosen by (seed, place of the source).
    """
    rows: list[Row] = []
    for place, source in enumerate(sources):
        found = read_source(source)
        if note := size_note(source, len(found)):
            _log.warning(note)
        if source.count is not None:
            if source.count > len(found):
                raise ValueError(
                    f"{annotation_file(source)}: count is {source.count} but the file has "
                    f"{len(found)} samples; lower data.sources[{place}].count"
                )
            chosen = np.random.default_rng((seed, place)).permutation(len(found))[: source.count]
            found = [found[i] for i in sorted(chosen)]
        rows += found
    return rows


def read_source(source: Source) -> list[Row]:
    """Every row of one source; the images it names are not opened yet."""
    path = annotation_file(source)
    root = source.root or path.parent
    entries = _read_jsonl(path) if source.kind == "jsonl" else _read_list(path)
    if not entries:
        raise ValueError(f"{path}: holds no sample; take the source out or fill the file")
    pictured = source.kind == "mis"
    return [_row(entry, f"{path}, row {i}", i, root, pictured) for i, entry in enumerate(entries)]


def annotation_file(source: Source) -> Path:
    """The file that lists a source's samples."""
    if source.kind == "mis":
        assert source.root is not None
        return source.root / f"mis_{source.split}.json"
    assert source.path is not None
    return source.path


def size_note(source: Source, count: int) -> str | None:
    """A remark when a published set does not have its published size."""
    wanted = PUBLISHED_SIZES.get(source.split) if source.kind == "mis" else None
    if wanted is None or wanted == count:
        return None
    return f"{annotation_file(source)}: {count} samples, the published set has {wanted}"


def _read_list(path: Path) -> list[Any]:
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); download the file again") from None
    entries = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise ValueError(f"{path}: holds {type(content).__name__}; expected a list of samples")
    return entries


def _read_jsonl(path: Path) -> list[Any]:
    entries = []
    # Only "\n" ends a line: splitlines() would also cut at U+2028, which JSON allows in a string.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not valid JSON ({error}); repair or remove the line"
                ) from None
    return entries


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors on Windows put a mark in front
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; check the source's root, path and split") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None


def _row(entry: Any, where: str, index: int, root: Path, pictured: bool) -> Row:
    """`pictured` samples have images by definition of their set."""
    if not isinstance(entry, dict):
        raise ValueError(
            f"{where}: expected an object with 'conversations', found {entry!r:.60}; "
            "check that the source's kind fits the file"
        )
    if "conversations" not in entry:
        raise ValueError(
            f"{where}: field 'conversations' is missing; add the turns or remove the row"
        )
    if pictured and "image" not in entry:
        raise ValueError(f"{where}: field 'image' is missing; name the images or remove the row")
    images = entry.get("image", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(
            f"{where}: field 'image' is {images!r:.60}; give a path or a list of paths"
        )
    if "image" in entry and not images:
        raise ValueError(
            f"{where}: field 'image' is empty; name its images, or drop the field for a text sample"
        )
    name = str(entry.get("id", index))
    return Row(name, where, tuple(root / image for image in images), entry)
