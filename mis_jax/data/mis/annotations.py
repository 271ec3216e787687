"""The samples of the published MIS files, checked one by one; no image is opened here.

Those of `train` are checked as training checks them (`annotations.py`): what it would refuse is not
stored, and what it takes is, LLaMA-Factory's names of fields included.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mis_jax.data.annotations import checked_fields, checked_messages, entry_id, read_samples

PUBLISHED_SIZES = {"train": 3927, "easy": 1675, "hard": 510, "real": 100}
VERSION = "1.0.0"  # of the set that is built of them
BadSample = dict[str, Any]  # split, row (its place in the file), id, reason


@dataclass(frozen=True)
class Sample:
    """A sample of a published file whose text is in order."""

    split: str
    number: int  # its place in the file, from 0
    id: str
    fields: Mapping[str, Any]  # as published, under InternVL's names
    names: tuple[str, ...]  # of its images, as the file gives them
    sizes: tuple[tuple[int, int], ...] = ()  # width and height of each, once they are decoded


@dataclass
class Split:
    """One published file: its good samples, its bad ones, and how many there are in all."""

    path: Path
    total: int
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
        ValueError: there is none, or one that is no list (or mapping) of samples.
    """
    paths = {split: annotation_path(root, split) for split in PUBLISHED_SIZES}
    present = {split: path for split, path in paths.items() if path.is_file()}
    if not present:
        names = ", ".join(path.name for path in paths.values())
        raise ValueError(f"{root}: has none of {names}; give the folder of the published MIS files")
    return {split: _read_split(split, path) for split, path in present.items()}


def _read_split(split: str, path: Path) -> Split:
    samples = read_samples(path)
    read = Split(path, len(samples))
    for number, sample in enumerate(samples):
        id = entry_id(sample, number)
        try:
            check = _checked_train if split == "train" else _checked_test
            fields, images = check(sample)
            _check_storable(sample)
        except ValueError as error:
            read.reject(split, number, id, str(error))
        else:
            read.samples.append(Sample(split, number, id, fields, images))
    return read


_Checked = tuple[Mapping[str, Any], tuple[str, ...]]  # the fields, and the names of the images


def _checked_train(sample: Any) -> _Checked:
    """As training reads it."""
    fields, images = checked_fields(sample, pictured=True)
    checked_messages(fields, len(images))
    return fields, images


def _checked_test(sample: Any) -> _Checked:
    """A question and two images."""
    if not isinstance(sample, dict):
        raise ValueError(f"expected an object, found {sample!r:.60}; remove or repair it")
    for name in ("question", "image_path1", "image_path2"):
        if name not in sample:
            raise ValueError(f"field '{name}' is missing; add it or remove the row")
        if not isinstance(sample[name], str) or not sample[name].strip():
            raise ValueError(f"field '{name}' is {sample[name]!r:.60}; give text or remove the row")
    return sample, (sample["image_path1"], sample["image_path2"])


def _check_storable(sample: dict[str, Any]) -> None:
    """What a record of the set has a place for."""
    for name in ("category", "sub_category"):
        if not isinstance(sample.get(name) or "", str):
            raise ValueError(f"field '{name}' is {sample[name]!r:.60}; give text or leave it out")
    try:
        json.dumps(sample, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds text that UTF-8 cannot store ({error}); repair it") from None
