"""A row of an annotation file -> what the model sees of it, or only how large that is."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mis_jax.data.annotations import checked_messages
from mis_jax.data.chat_template import Rendered, truncate
from mis_jax.data.collate import Example
from mis_jax.data.images import EncodedImage, image_size
from mis_jax.data.jpeg_augment import encoded_again
from mis_jax.data.mixture import Annotation
from mis_jax.data.processor import Processor
from mis_jax.data.tile_cache import TileCache


@dataclass(frozen=True)
class Size:
    """How large a sample is."""

    tokens: int  # of a row, image tokens included
    loss_tokens: int
    tiles: int
    cut: int  # tokens that truncation took away


@dataclass(frozen=True)
class PreprocessSample:
    """Renders rows for one run. Both ways of asking raise ValueError naming file, row and field."""

    processor: Processor
    max_tiles: int  # of a sample, divided over its images
    max_length: int  # tokens
    truncate: bool = False  # cut an answer that is too long, in the place of refusing the sample
    cache: TileCache | None = None

    def size(self, row: Annotation) -> Size:
        """How large a row is; of its images only the headers are read."""
        try:
            messages, budget = self._checked(row)
            counts = [self.processor.tile_count(image_size(image), budget) for image in row.images]
            rendered, cut = self._rendered(messages, counts)
        except ValueError as error:
            raise _placed(row, error) from None
        return Size(len(rendered.input_ids), int(rendered.loss_mask.sum()), sum(counts), cut)

    def __call__(self, row: Annotation, rng: np.random.Generator | None = None) -> Example:
        """A row with its images; `rng` decides how augmented tiles are changed."""
        try:
            messages, budget = self._checked(row)
            tiles = [self._tiles(image, budget) for image in row.images]
            rendered, _ = self._rendered(messages, [len(t) for t in tiles])
        except ValueError as error:
            raise _placed(row, error) from None
        if row.augment and rng is not None:
            tiles = [encoded_again(t, rng) for t in tiles]
        return self.processor.joined(row.id, rendered, tiles)

    def _checked(self, row: Annotation) -> tuple[list[dict[str, str]], int]:
        """Messages of a row, and the largest grid of each of its images."""
        if row.problem:
            raise ValueError(row.problem)
        messages = checked_messages(row.fields, len(row.images))
        return messages, self.processor.budget(len(row.images), row.max_tiles or self.max_tiles)

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


def _placed(row: Annotation, error: ValueError) -> ValueError:
    return error if str(error) == row.problem else ValueError(f"{row.where}: {error}")
