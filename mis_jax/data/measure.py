"""How large every sample of a run is, and which cannot be used, before an image is decoded.

Plans, shapes and statistics are made of it. All images are opened for their headers, which takes
about a millisecond a sample; the outcome is kept in the run's folder.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Int

from mis_jax.data.mixture import Annotation
from mis_jax.data.preprocess import PreprocessSample, Size
from mis_jax.data.readers import in_order
from mis_jax.parsing import parse_json
from mis_jax.storage.files import read_arrays, read_bytes, write_arrays

_VERSION = 1  # another way of measuring needs another
_FEW = 5000  # annotations that one process looks at in a few seconds
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Measurements:
    """Sizes by annotation; all 0 for one that cannot be used, which `problems` tells."""

    tokens: Int[np.ndarray, " annotations"]
    loss_tokens: Int[np.ndarray, " annotations"]
    tiles: Int[np.ndarray, " annotations"]
    cut: Int[np.ndarray, " annotations"]  # tokens that truncation takes away
    problems: dict[int, str]  # number -> one line with file, line, field and remedy
    key: str  # of what it was made from

    @property
    def good(self) -> Int[np.ndarray, " good"]:
        """Annotations that can be used."""
        return np.flatnonzero(self.tokens > 0)


def survey(
    annotations: Sequence[Annotation],
    render: PreprocessSample,
    *,
    saved: Path | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> Measurements:
    """Measure every annotation, or take the outcome from the file `saved` if it is of the same."""
    key = _key(annotations, render)
    if saved is not None and (known := _load(saved, key)) is not None:
        if progress:
            progress(len(annotations), len(annotations))
        return known
    sizes = np.zeros((4, len(annotations)), np.int32)
    problems: dict[int, str] = {}
    workers = workers if len(annotations) > _FEW else 0  # starting a process takes seconds
    with closing(in_order(_Measure(render), annotations, workers)) as measured:
        for number, outcome in enumerate(measured):
            if isinstance(outcome, Size):
                sizes[:, number] = (
                    outcome.tokens,
                    outcome.loss_tokens,
                    outcome.tiles,
                    outcome.cut,
                )
            else:
                problems[number] = outcome
            if progress:
                progress(number + 1, len(annotations))
    return _survey(sizes, problems, key)


def _survey(sizes: np.ndarray, problems: dict[int, str], key: str) -> Measurements:
    tokens, loss_tokens, tiles, cut = sizes
    return Measurements(tokens, loss_tokens, tiles, cut, problems, key)


def save(survey: Measurements, path: Path) -> None:
    """Write a survey for `survey(saved=path)`; whole or not at all."""
    text = json.dumps({"key": survey.key, "problems": survey.problems})
    sizes = np.stack([survey.tokens, survey.loss_tokens, survey.tiles, survey.cut])
    write_arrays(path, {"sizes": sizes, "text": np.frombuffer(text.encode(), np.uint8)})


def _load(path: Path, key: str) -> Measurements | None:
    """A saved survey; None when there is none, or one of other annotations, or a damaged one."""
    try:
        arrays = read_arrays(path)
        sizes, text = arrays["sizes"], parse_json(arrays["text"].tobytes())
        if text["key"] != key:
            return None
        return _survey(sizes, {int(r): p for r, p in text["problems"].items()}, key)
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
        return None  # an absent or broken file is made again


@dataclass(frozen=True)
class _Measure:
    """What the readers run."""

    render: PreprocessSample

    def __call__(self, annotation: Annotation) -> Size | str:
        try:
            return self.render.size(annotation)
        except ValueError as error:
            return str(error)


def _key(annotations: Sequence[Annotation], render: PreprocessSample) -> str:
    """Of everything that sizes depend on: annotations, image files, tokenizer, settings."""
    hasher = hashlib.sha256()

    def add(value: Any) -> None:
        hasher.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")

    processor = render.processor
    config = processor.config
    add([_VERSION, render.max_tiles, render.max_length, render.truncate, render.rows])
    add([config.tokens_per_tile, config.vision.image_size, config.use_thumbnail, config.min_tiles])
    add([config.dynamic_tiles, config.template, config.system_message])
    for path in sorted(processor.tokenizer.folder.glob("*")):
        if path.is_file() and path.suffix in (".json", ".model", ".txt"):
            hasher.update(hashlib.sha256(read_bytes(path)).digest())
    for annotation in annotations:
        images = [_file(image) for image in annotation.images]
        place = [annotation.where, annotation.problem]  # problems are kept with their places
        add([annotation.id, images, place, annotation.max_tiles, annotation.fields])
    return hasher.hexdigest()


def _file(image: Any) -> list[Any]:
    if not isinstance(image, Path):
        return [str(image)]
    try:
        stat = image.stat()
    except OSError:
        return [str(image), None]
    return [str(image), stat.st_size, stat.st_mtime_ns]
