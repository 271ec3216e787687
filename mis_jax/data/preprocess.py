"""An annotation -> what the model sees of it (tiles and tokens), or only how large that is."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mis_jax.data.annotations import checked_messages
from mis_jax.data.chat_template import Rendered, truncate
from mis_jax.data.collate import Example
from mis_jax.data.images import EncodedImage, image_size
from mis_jax.data.mixture import Annotation
from mis_jax.data.processor import Processor
from mis_jax.data.upstream_policy import upstream_messages
from mis_jax.storage.files import make_folder, read_array, write_array

_QUALITY = 75, 100  # of augmentation; both included, as upstream draws it


@dataclass(frozen=True)
class TileCache:
    """A folder with a file of tiles for each image and grid; any number of processes share it.

    Images are decoded and resized once, not once an epoch. A tile takes 602 KB at 448 pixels; a set
    of 4,000 samples with two one-tile images takes 4.8 GB.
    """

    folder: Path

    def tiles(self, image: Any, budget: int, processor: Processor) -> np.ndarray:
        """The tiles of an image in a file; ValueError when it cannot be opened."""
        config = processor.config
        rule = config.min_tiles, budget, config.vision.image_size, config.use_thumbnail
        name = hashlib.sha256(repr((_identity(image), rule)).encode()).hexdigest()
        path = self.folder / name[:2] / f"{name}.npy"
        try:
            return read_array(path)
        except (FileNotFoundError, ValueError, EOFError):  # absent, or cut short by a crash
            tiles = processor.tiles(image, budget)
        make_folder(path.parent)
        write_array(path, tiles)
        return tiles


def _identity(image: Any) -> tuple[Any, ...]:
    """What changes when an image does."""
    if isinstance(image, Path):
        try:
            stat = image.stat()
        except OSError:  # whoever opens it tells what is wrong
            return (str(image),)
        return str(image.absolute()), stat.st_size, stat.st_mtime_ns
    # A stored one by its bytes: a set that is built again in its folder has the same names.
    return (hashlib.sha256(image.encoded()).hexdigest(),)


@dataclass(frozen=True)
class Size:
    """How large a sample is."""

    tokens: int  # of a sample, image tokens included
    loss_tokens: int
    tiles: int
    cut: int  # tokens that truncation took away


@dataclass(frozen=True)
class PreprocessSample:
    """Renders annotations for one run.

    Both ways of asking raise ValueError naming file, line and field.
    """

    processor: Processor
    max_tiles: int  # of a sample, divided over its images
    max_length: int  # tokens
    truncate: bool = False  # cut an answer that is too long, in the place of refusing the sample
    cache: TileCache | None = None
    rows: Literal["strict", "upstream"] = "strict"  # which annotations are good ones

    def size(self, annotation: Annotation) -> Size:
        """How large a sample is; of its images only the headers are read."""
        try:
            messages, budget = self._checked(annotation)
            counts = [
                self.processor.tile_count(image_size(image), budget) for image in annotation.images
            ]
            rendered, cut = self._rendered(messages, counts)
        except ValueError as error:
            raise _placed(annotation, error) from None
        return Size(len(rendered.input_ids), int(rendered.loss_mask.sum()), sum(counts), cut)

    def __call__(self, annotation: Annotation, rng: np.random.Generator | None = None) -> Example:
        """A sample with its images; `rng` decides how augmented tiles are changed."""
        try:
            messages, budget = self._checked(annotation)
            tiles = [self._tiles(image, budget) for image in annotation.images]
            rendered, _ = self._rendered(messages, [len(t) for t in tiles])
        except ValueError as error:
            raise _placed(annotation, error) from None
        if annotation.augment and rng is not None:
            tiles = [jpeg_augment(t, rng) for t in tiles]
        return self.processor.joined(annotation.id, rendered, tiles)

    def _checked(self, annotation: Annotation) -> tuple[list[dict[str, str]], int]:
        """Messages of a sample, and the largest grid of each of its images."""
        if annotation.problem:
            raise ValueError(annotation.problem)
        count = len(annotation.images)
        check = upstream_messages if self.rows == "upstream" else checked_messages
        messages = check(annotation.fields, count)
        return messages, self.processor.budget(count, annotation.max_tiles or self.max_tiles)

    def _tiles(self, image: Path | EncodedImage, budget: int) -> np.ndarray:
        if self.cache is None:
            return self.processor.tiles(image, budget)
        return self.cache.tiles(image, budget, self.processor)

    def _rendered(self, messages: list[dict[str, str]], counts: list[int]) -> tuple[Rendered, int]:
        rendered = self.processor.render(messages, counts, add_generation_prompt=False)
        length, cut = len(rendered.input_ids), 0
        if length > self.max_length and self.truncate:
            rendered, cut = truncate(rendered, self.max_length)
            if not rendered.loss_mask.any():
                raise ValueError(
                    f"{length} tokens, and the first {self.max_length} (data.max_length) hold no "
                    "word of an answer; raise it or set data.on_bad_sample: skip"
                )
        elif length > self.max_length:
            raise ValueError(
                f"{length} tokens, more than data.max_length {self.max_length}; raise it, lower "
                "data.max_tiles, set data.too_long: truncate, or set data.on_bad_sample: skip"
            )
        return rendered, cut


def _placed(annotation: Annotation, error: ValueError) -> ValueError:
    return error if str(error) == annotation.problem else ValueError(f"{annotation.where}: {error}")


def jpeg_augment(
    tiles: UInt8[np.ndarray, "tiles size size 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "tiles size size 3"]:
    """Each tile through JPEG of a quality drawn for it (OpenGVLab/InternVL `dataset.py`)."""
    qualities = rng.integers(*_QUALITY, size=len(tiles), endpoint=True)
    return np.stack([_through_jpeg(t, int(q)) for t, q in zip(tiles, qualities, strict=True)])


def _through_jpeg(tile: np.ndarray, quality: int) -> np.ndarray:
    encoded = io.BytesIO()
    Image.fromarray(tile).save(encoded, format="JPEG", quality=quality)
    return np.asarray(Image.open(encoded, formats=["JPEG"]))
