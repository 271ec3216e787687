"""The annotations of a run: once on the machine, whatever the number of processes that read them.

A million Python objects take 3 GB, and a copy of them goes to every worker. Here they lie in one
mapped file and are made when they are asked for.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from mis_jax.data.images import EncodedImage
from mis_jax.parsing import parse_json
from mis_jax.storage.records import Records


@dataclass(frozen=True)
class Annotation:
    """One annotation, not yet opened or rendered."""

    id: str
    where: str  # file and place in it, for errors
    images: tuple[Path | EncodedImage, ...]
    fields: Mapping[str, Any]  # as in the file; `conversations` is checked when rendered
    problem: str = ""  # why the file's entry cannot be read, with its place and the remedy
    max_tiles: int | None = None  # of its source, in the place of the run's
    augment: bool = False  # encode its tiles as JPEG again, as its source asks


class AnnotationStore(Sequence[Annotation]):
    """Annotations of files of records, in an order of their own; one may stand there repeatedly.

    A slice, and what goes to another process, share the files.
    """

    def __init__(self, files: tuple[Records, ...], numbers: Int[np.ndarray, " annotations"]):
        self._files, self._numbers = files, numbers  # these count through all files
        self._starts = np.cumsum([0, *map(len, files)])

    @classmethod
    def of(cls, annotations: Iterable[Annotation]) -> "AnnotationStore":
        """The annotations in their order, written as they come."""
        records = Records(map(_encoded, annotations))
        return cls((records,), np.arange(len(records)))

    @classmethod
    def joined(cls, stores: Sequence["AnnotationStore"]) -> "AnnotationStore":
        """The annotations of all, one store after the other."""
        first = np.cumsum([0, *(store._starts[-1] for store in stores)])
        numbers = [store._numbers + start for store, start in zip(stores, first, strict=False)]
        return cls(tuple(f for store in stores for f in store._files), np.concatenate(numbers))

    def take(self, places: Int[np.ndarray, " chosen"]) -> "AnnotationStore":
        """Those at so many places."""
        return AnnotationStore(self._files, self._numbers[places])

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        number = self._numbers[place]
        file = int(np.searchsorted(self._starts, number, "right")) - 1
        return _decoded(self._files[file][int(number - self._starts[file])])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


def _encoded(annotation: Annotation) -> bytes:
    a = annotation
    images = [str(image) if isinstance(image, Path) else _plain(image) for image in a.images]
    head = [a.id, a.where, images, a.problem, a.max_tiles, a.augment]
    return f"{json.dumps(head)}\n{json.dumps(a.fields)}".encode()  # each on its line


def _plain(image: Any) -> dict[str, Any]:
    """An image of a built set, a `RecordImage`."""
    return asdict(image) | {"folder": str(image.folder)}


def _decoded(record: bytes) -> Annotation:
    head, fields = map(parse_json, record.split(b"\n"))
    id, where, images, problem, max_tiles, augment = head
    return Annotation(id, where, tuple(map(_image, images)), fields, problem, max_tiles, augment)


def _image(image: Any) -> Path | EncodedImage:
    if isinstance(image, str):
        return Path(image)
    from mis_jax.data.mis.dataset import RecordImage  # most runs do without it

    return RecordImage(**image | {"folder": Path(image["folder"])})
